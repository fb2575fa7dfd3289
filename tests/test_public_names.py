"""Public names, their arguments (which are the keys of YAML files) and options change deliberately, or not at all."""

import difflib

from public_names import FILE, public_names


def test_public_names_arguments_and_options_are_those_of_the_list():
    kept, found = FILE.read_text().splitlines(), public_names()
    difference = list(difflib.unified_diff(kept, found, FILE.name, "the code", n=2, lineterm=""))
    advice = (
        "This would change what users have in their code, YAML files or shells. If it is meant, run "
        "`make public-names` (python tests/public_names.py) and say in CHANGELOG.md what users must change; "
        "otherwise keep the old name too."
    )
    assert not difference, "\n".join(["", *difference, "", advice])


def test_the_list_holds_what_users_write_most():
    kept = set(FILE.read_text().splitlines())
    assert {"liveselect.callbacks.MATES", "    every_n_steps=", "    min_spearman=", "liveselect prepare"} <= kept
    assert {"liveselect.datamodules.ReferenceSet", "    probe_batch_size=", "    --block-size"} <= kept
