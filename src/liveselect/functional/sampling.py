"""Draw k of n without replacement, exactly, for n up to hundreds of millions, in bounded memory."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Part of every draw: the noise of candidate i is entry i % _CHUNK_ROWS of the stream of chunk i // _CHUNK_ROWS, so it
# depends on neither the number of threads nor the order of the chunks. 512 KiB of float64 stay in a core's cache.
_CHUNK_ROWS = 1 << 16
_MAX_SAMPLE_SIZE = 1 << 16  # keys drawn to guess where the k-th largest lies, and no more than one in 64
_MAX_TEMPERATURE = 1e300  # keys stay finite below it
_BRACKET_DEVIATIONS = 6.0  # standard deviations on either side of the guess: one draw in 10^8 needs a second pass

_Rows = slice | npt.NDArray[np.int64]
_Keys = Callable[[_Rows, int, tuple[int, int]], npt.NDArray[np.floating]]
# the keys of ``size`` rows of the candidates, with the noise of one (stream, chunk)

_KEY_STREAM, _SAMPLE_KEY_STREAM, _SAMPLE_ROW_STREAM = range(3)  # the independent streams of noise


def gumbel_topk(scores: Tensor, k: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw ``k`` of ``n`` candidates without replacement, with weights ``exp(score / temperature)``.

    The k largest of ``scores + temperature * Gumbel(0, 1)``: exactly the set that the Plackett-Luce model draws one
    after the other (Kool et al. 2019, arXiv 1903.06059). Temperature 0 takes the k largest, of equal scores the first;
    a temperature far above the spread of the scores draws uniformly. A score of -inf has weight 0.

    The noise is derived from one integer of the generator and the position of the candidate, in float64. Equal
    arguments give the same set on every rank, with any number of threads. (Other platforms may round a logarithm in
    its last bit: candidates whose keys agree in 15 digits could change places there.) Beside the scores the call needs
    one byte for each candidate, the result, and a few dozen MB.

    Args:
        scores: ``(n,)`` floating point, larger is better.
        k: number to draw, 0..n.
        temperature: strength of the noise, in the unit of the scores.
        generator: advanced by one draw.

    Returns:
        ``(k,)`` int64 distinct positions in ``scores``, ascending, on CPU.

    Raises:
        ValueError: NaN or +inf among the scores, fewer than k scores above -inf, or arguments out of range.
    """
    return _perturbed_topk(scores, k, temperature, generator, sign=1.0)


def released_bottomk(scores: Tensor, k: int, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw ``k`` of ``n`` candidates as the released code of MATES does.

    That code keeps the k smallest of ``loss / temperature + Gumbel(0, 1)``. With larger-is-better scores this is the k
    largest of ``scores - temperature * Gumbel(0, 1)``: the complement of a Plackett-Luce draw of n - k candidates with
    weights ``exp(-score / temperature)``. It selects harder than :func:`gumbel_topk` at the same temperature.
    Arguments, result and errors are those of :func:`gumbel_topk`.
    """
    return _perturbed_topk(scores, k, temperature, generator, sign=-1.0)


def capped_topk(keys: Tensor, groups: Tensor, k: int, most: int) -> Tensor:
    """Return the positions of the ``k`` largest of ``keys (n,)`` of which no more than ``most`` are of one group.

    Where the groups do not hold enough, the largest of the others follow.

    Args:
        keys: ``(n,)``, larger is better; of equal ones the first is.
        groups: ``(n,)`` int64.
        k: number to take, 0..n.
        most: of each group, at least 1.

    Returns:
        ``(k,)`` int64 distinct positions, ascending.
    """
    _check_k(k, len(keys))
    order = keys.argsort(descending=True, stable=True)
    by_group = groups[order].argsort(stable=True)  # each group's, best first
    counts = torch.bincount(groups, minlength=1)
    first = (counts.cumsum(0) - counts)[groups[order][by_group]]
    place = torch.empty_like(order)
    place[by_group] = torch.arange(len(order)) - first  # of each in its group, along the order
    within = place < most
    return torch.cat([order[within], order[~within]])[:k].sort().values


def uniform_subset(n: int, k: int, generator: torch.Generator) -> Tensor:
    """Draw ``k`` of ``n`` candidates without replacement, all subsets equally likely.

    Returns ``(k,)`` int64 positions, ascending, on CPU; equal on every rank, like those of :func:`gumbel_topk`, and in
    the same memory.

    Raises:
        ValueError: k is not in 0..n.
    """
    _check_k(k, n)
    seed = _draw_seed(generator)

    room = np.empty(min(n, _CHUNK_ROWS))

    def keys(_: _Rows, size: int, place: tuple[int, int]) -> npt.NDArray[np.floating]:
        return _uniform(seed, place, size, room)

    return _largest(n, k, keys, seed)


class Noise:
    """The noise of one draw, so that every decision can be explained afterwards.

    The draw is that of :func:`gumbel_topk` (``sign=1``) or :func:`released_bottomk` (``sign=-1``) with an equal
    generator and temperature, which took the ``k`` largest of ``scores + noise``.

    Args:
        temperature: strength of the noise, in the unit of the scores.
        generator: advanced by one draw, as the draw does.
        sign: of the noise.
    """

    def __init__(self, temperature: float, generator: torch.Generator, sign: float = 1.0) -> None:
        self._scale = sign * temperature
        self._seed = _draw_seed(generator)

    def __call__(self, start: int, stop: int) -> Tensor:
        """Return the noise of the candidates ``start .. stop - 1``, ``(stop - start,)`` float64."""
        if not self._scale or stop <= start:
            return torch.zeros(max(0, stop - start), dtype=torch.float64)
        first, last = start // _CHUNK_ROWS, (stop - 1) // _CHUNK_ROWS
        # a short last chunk is the beginning of the whole one
        drawn = [_gumbel(self._seed, (_KEY_STREAM, chunk), _CHUNK_ROWS) for chunk in range(first, last)]
        drawn.append(_gumbel(self._seed, (_KEY_STREAM, last), stop - last * _CHUNK_ROWS))
        return torch.from_numpy(self._scale * np.concatenate(drawn)[start - first * _CHUNK_ROWS :])


def _perturbed_topk(scores: Tensor, k: int, temperature: float, generator: torch.Generator, sign: float) -> Tensor:
    if scores.dim() != 1 or not scores.is_floating_point():
        raise ValueError(f"expected scores (n,) of a floating point type, got {tuple(scores.shape)} {scores.dtype}")
    if not 0.0 <= temperature <= _MAX_TEMPERATURE:
        raise ValueError(f"expected a temperature in 0..{_MAX_TEMPERATURE:g}, got {temperature}")
    scores = scores.detach().cpu()
    _check_k(k, len(scores))
    _check_scores(scores, k)
    seed = _draw_seed(generator)
    # scores + temperature * noise orders like scores / temperature + noise, and has the limit 0 without overflow
    scale = sign * temperature

    values = scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores
    given, room = values.numpy(), np.empty(min(len(scores), _CHUNK_ROWS))

    def keys(rows: _Rows, size: int, place: tuple[int, int]) -> npt.NDArray[np.floating]:
        if not scale:
            return given[rows]
        noise = _gumbel(seed, place, size, room)
        noise *= scale
        noise += given[rows]  # widened on the way
        return noise

    return _largest(len(scores), k, keys, seed)


def _check_k(k: int, n: int) -> None:
    if not 0 <= k <= n:
        raise ValueError(f"cannot draw {k} of {n} candidates without replacement: expected k in 0..{n}")


def _check_scores(scores: Tensor, k: int) -> None:
    counts = {"NaN": 0, "+inf": 0, "-inf": 0}
    for start, stop in _chunks(len(scores)):
        part = scores[start:stop]
        if not math.isfinite(float(part.sum())):  # or their sum is beyond the type, which is no harm
            counts["NaN"] += int(part.isnan().sum())
            counts["+inf"] += int(part.isposinf().sum())
            counts["-inf"] += int(part.isneginf().sum())
    if counts["NaN"] or counts["+inf"]:
        raise ValueError(
            f"expected scores that can be compared, got {counts['NaN']} NaN and {counts['+inf']} +inf among "
            f"{len(scores)}: drop these candidates, or give them the score -inf so that they are never drawn"
        )
    if len(scores) - counts["-inf"] < k:
        raise ValueError(
            f"cannot draw {k} candidates: {counts['-inf']} of {len(scores)} have the score -inf and are never drawn"
        )


def _draw_seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))


def _uniform(
    seed: int, place: tuple[int, int], size: int, room: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.float64]:
    """Return ``size`` numbers, ``((raw >> 12) + 0.5) * 2^-52`` of the generator's raw bits, in ``room`` where it fits.

    They are the centres of 2^52 cells: neither 0 nor 1 occurs, so the logarithms below are finite.
    """
    if room is None or size > len(room):
        room = np.empty(size)
    # the generator's own doubles are (raw >> 11) * 2^-53, written without another array; a test holds them to it
    uniform: npt.NDArray[np.float64] = room[:size]
    np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, *place)))).random(out=uniform)
    uniform *= 2.0**52
    np.floor(uniform, out=uniform)
    uniform += 0.5
    uniform *= 2.0**-52
    return uniform


def _gumbel(
    seed: int, place: tuple[int, int], size: int, room: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.float64]:
    noise = _uniform(seed, place, size, room)
    np.log(noise, out=noise)
    np.negative(noise, out=noise)
    np.log(noise, out=noise)
    return np.negative(noise, out=noise)


def _chunks(n: int) -> Iterator[tuple[int, int]]:
    return ((start, min(n, start + _CHUNK_ROWS)) for start in range(0, n, _CHUNK_ROWS))


class _Bound(NamedTuple):
    """A place in the order of all candidates: by key, descending, then by position, so that no two are equal."""

    key: float
    position: int

    def precede(self, keys: npt.NDArray[np.floating], start: int, inclusive: bool) -> npt.NDArray[np.bool_]:
        """Return which of the candidates from ``start`` on come before this place, ``(n,)``; at it if ``inclusive``."""
        before: npt.NDArray[np.bool_] = keys > self.key
        tied = keys == self.key
        if tied.any():
            tied[max(0, self.position - start + inclusive) :] = False  # they come after it
            before |= tied
        return before


def _largest(n: int, k: int, keys: _Keys, seed: int) -> Tensor:
    """Return the positions of the ``k`` largest keys, ascending; of equal keys the first.

    A sample of keys brackets the k-th largest; one pass takes the candidates above the bracket and compares those
    inside. Positions break ties, so only a small share of the candidates lies inside, even where all scores are equal.
    """
    if k in (0, n):
        return torch.arange(k)
    margin = _BRACKET_DEVIATIONS
    while True:
        upper, lower = _bracket(n, k, keys, seed, margin)
        chosen = np.zeros(n, dtype=np.bool_)
        inside: list[tuple[npt.NDArray[np.floating], npt.NDArray[np.int64]]] = [
            (np.empty(0), np.empty(0, dtype=np.int64))
        ]
        above = 0
        for start, stop in _chunks(n):
            values = keys(slice(start, stop), stop - start, (_KEY_STREAM, start // _CHUNK_ROWS))
            maybe = lower.precede(values, start, inclusive=True)
            surely = upper.precede(values, start, inclusive=False)
            chosen[start:stop] = surely
            above += int(np.count_nonzero(surely))
            rows = np.flatnonzero(maybe ^ surely)
            inside.append((values[rows], rows + start))
        values, positions = (np.concatenate(parts) for parts in zip(*inside, strict=True))
        if above <= k <= above + len(values):
            chosen[positions[_first_largest(values, k - above)]] = True
            return torch.from_numpy(np.flatnonzero(chosen))
        margin *= 4  # the bracket missed; in the end it holds everything


def _first_largest(values: npt.NDArray[np.floating], k: int) -> npt.NDArray[np.int64]:
    """Return the places of the ``k`` largest values; of equal values the first."""
    if k == 0:
        return np.empty(0, dtype=np.int64)
    smallest = np.partition(values, len(values) - k)[len(values) - k]
    larger = np.flatnonzero(values > smallest)
    return np.concatenate([larger, np.flatnonzero(values == smallest)[: k - len(larger)]])


def _bracket(n: int, k: int, keys: _Keys, seed: int, margin: float) -> tuple[_Bound, _Bound]:
    """Return an upper and a lower bound of the k-th largest key."""
    everything = _Bound(np.inf, -1), _Bound(-np.inf, n)
    if n <= _CHUNK_ROWS:
        return everything
    size = min(_MAX_SAMPLE_SIZE, n // 64)
    positions = (_uniform(seed, (_SAMPLE_ROW_STREAM, 0), size) * n).astype(np.int64)
    values = keys(positions, size, (_SAMPLE_KEY_STREAM, 0))
    order = np.lexsort((positions, -values))
    share = k / n
    expected = share * size
    deviation = size * (share * (1 - share) * (1 / size + 1 / n)) ** 0.5 + 1
    first, last = int(expected - margin * deviation), int(expected + margin * deviation) + 1
    upper = everything[0] if first < 0 else _Bound(float(values[order[first]]), int(positions[order[first]]))
    lower = everything[1] if last >= size else _Bound(float(values[order[last]]), int(positions[order[last]]))
    return upper, lower
