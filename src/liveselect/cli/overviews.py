"""What ``--help`` says of the commands whose parsers need torch and Lightning: in a second, and in our own words."""

_FIT = """\
usage: liveselect fit --config FILE [--config FILE ...] [--SECTION.NAME VALUE ...]

Train a model while its data is selected. A YAML file has a section for each part; later files and options win.

  select   which data is trained on: class_path, such as liveselect.callbacks.LiveSelection (recommended), MATES, Quad
           or PDS, and init_args, such as every_n_steps and ratio
  data     liveselect.datamodules.SelectionDataModule: the pool, the reference set, batch_size, the validation set
  model    any LightningModule; liveselect.cli.model.CausalLM trains a Hugging Face configuration
  trainer  arguments of lightning.pytorch.Trainer: max_steps, devices, precision, logger, callbacks, ...

  liveselect fit --config run.yaml
  liveselect fit --config run.yaml --select.init_args.ratio=0.1 --trainer.max_steps=2000
  liveselect fit --config run.yaml --ckpt_path last        # go on where a run stopped

options:
  --config FILE     a file of settings; may be repeated
  --ckpt_path PATH  go on from a checkpoint; `last` and `best` are understood
  --print_config    show all settings with their defaults, and stop: the beginning of a file of your own
  --help            show this text
  --help-all        list every option of every section
"""

_VALIDATE = """\
usage: liveselect validate --config FILE --ckpt_path PATH [--SECTION.NAME VALUE ...]

Evaluate a checkpoint on the validation set. The file is one of `liveselect fit`, such as the config.yaml that it wrote
beside the run; its sections model, data and trainer are read, select is not: nothing is selected.

  liveselect validate --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt

options:
  --config FILE     a file of settings; may be repeated
  --ckpt_path PATH  the checkpoint
  --help            show this text
  --help-all        list every option of every section
"""

_SCORE = """\
usage: liveselect score --config FILE --out FOLDER [--method NAME] [--SECTION.NAME VALUE ...]

Score every sequence of a pool before training, for `select` of `liveselect fit` to draw from or to use as a prior. The
file is one of `liveselect fit`: its section data names the pool and the reference set, its section model is the proxy.

  select   not read here; in a run it takes the scores: liveselect.callbacks.PDS with scores: FOLDER
  data     liveselect.datamodules.SelectionDataModule: the pool and the reference set
  model    the proxy, for methods that ask one; --ckpt_path loads its weights

  liveselect score --config run.yaml --method ngram-ratio --out scores/ratio
  liveselect score --config run.yaml --ckpt_path proxy.ckpt --out scores/pds
  liveselect score --pool pools/web --column edu_score --out scores/edu

methods (--method): ngram-ratio, dsir, bm25, embed, near-duplicates, semantic-duplicates without a model; perplexity,
rho, less, tap with one. Without --method it solves for influence on the proxy, and fits a scorer (PDS).

options:
  --config FILE     a file of `liveselect fit`; may be repeated
  --out FOLDER      where the scores are written; a command that was stopped goes on there
  --method NAME     score by a known method; --settings.NAME VALUE sets it
  --ckpt_path PATH  weights of the proxy
  --filter FOLDER   scores of the same pool: what is -inf there is -inf here
  --help            show this text
  --help-all        list every option of every section
"""

OVERVIEWS = {"fit": _FIT, "validate": _VALIDATE, "score": _SCORE}
"""By command."""
