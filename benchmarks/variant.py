"""Take a function from a file of yours, and hold it against an operation's formula before it is timed.

    python -m benchmarks ops --contract norm > my_norm.py        # what it gets and returns, and a first version
    python -m benchmarks ops --add my_norm.py:norm --against norm

A function is right when its values and gradients are the formula's (`contract.py`), for the inputs that are timed, for
others in the same tensors, and for those others in new tensors after it was timed. It may not change its inputs, and
does the same work at each call, so that nothing is kept from one call for another. A wrong one gets its error, and no
time.

The file is your own code, and runs as such, with all that you may do: add only files that you would run.
"""

import inspect
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks import agreement
from benchmarks.contract import Arguments, contract, other_values
from benchmarks.operation import Call, Operation, Step
from benchmarks.user_file import WrongError, kind_of, load, said_of, split

Results: TypeAlias = dict[str, Tensor]  # by what it is: a value, a gradient, the change of an input
ROW = 4  # a single row may be this many times as far off as a whole tensor
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {  # a function could change them for all
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "precision of float32 products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic mode": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
}
REPEATED = 0.1  # what two calls with the same inputs may differ by, as a share of what they may be off


@dataclass
class Trial:
    """One function, held against the formula of an operation.

    Args:
        place: "FILE.py:NAME".
        name: the operation's.
        limit: the largest relative difference in the run's dtype, and in float32.

    Attributes:
        first: the arguments that are timed; the operation's leaves are among them.
        second: other values.
    """

    place: str
    name: str
    step: Step
    operation: Operation
    limits: tuple[float, float]
    function: Callable[..., Any] = field(init=False)
    first: Arguments = field(init=False)
    second: Arguments = field(init=False)
    expected: Results = field(init=False)  # for the second arguments
    held: list[Tensor] = field(default_factory=list)  # what the last call has returned, and its gradients

    def __post_init__(self) -> None:
        self.file, _ = split(self.place)
        self.contract = contract(self.name)
        self.limit = self.limits[1] if self.contract.exact else self.limits[0]

    def check(self) -> None:
        """Load the function, and raise WrongError unless it keeps its contract."""
        self.settings = {name: read() for name, (read, _) in SETTINGS.items()}
        self.function = load(self.place)
        self._check_settings()
        self.first = self.contract.make(self.step, self.operation)
        self.second = other_values(self.first, self.step.generator)
        self._check_arity()
        live = _copied(self.first) if self.contract.writes else self.first
        kept = _copied(self.first)
        try:
            found = self._found(live)
            self._compare(found, self._right(kept), "")
            if self.contract.writes:
                _fill(live, kept)
            self._compare_repeated(self._found(live, _Counter()), found)
            _fill(live, self.second)
            self.expected = self._right(self.second)
            self._check_others({name: self.second[name] if _is_number(one) else one for name, one in live.items()})
        finally:
            _fill(self.first, kept)

    def _check_others(self, arguments: Arguments) -> None:
        """Raise WrongError unless the function is right for other values in the same tensors, and keeps nothing."""
        once, again = _Counter(), _Counter()
        self._compare(self._found(arguments, once), self.expected, "for other inputs in the same tensors, ")
        if self.contract.writes:
            return
        held, threads = self.held, threading.active_count()  # a compiler's threads were left by the calls before
        self._found(arguments, again)
        if threading.active_count() > threads:
            raise WrongError("it leaves a thread running")
        if again.calls < once.calls:
            raise WrongError(
                f"called again with the same inputs it does less work, {again.calls} operations in place of "
                f"{once.calls}: it keeps something from one call for another"
            )
        if {one.untyped_storage().data_ptr() for one in held} & {one.untyped_storage().data_ptr() for one in self.held}:
            raise WrongError("two calls return the same memory: it keeps a result, or writes over an earlier one")

    def check_again(self) -> None:
        """Raise WrongError unless the function, after it was timed, is right for new tensors with other values."""
        with torch.no_grad():
            arguments = _copied(self.second)
        for name, value in self.first.items():
            if isinstance(value, Tensor) and value.requires_grad:
                arguments[name].requires_grad_()
        self._compare(self._found(arguments), self.expected, "after it was timed, for other inputs, ")

    def call(self) -> Call:
        """Return a call of the function for timing, on the first arguments."""
        arguments = tuple(self.first.values())

        def call() -> tuple[Tensor, ...]:
            with self._context():
                result = self.function(*arguments)
            return result if isinstance(result, tuple) else (result,)

        return call

    def _context(self) -> Any:
        return nullcontext() if self.contract.writes else self.step.setting.autocast()

    def _check_arity(self) -> None:
        try:
            signature = inspect.signature(self.function)
            signature.bind(*self.first.values())
        except TypeError as error:
            raise WrongError(f"it has the arguments {signature}, but gets ({', '.join(self.first)}): {error}") from None
        except ValueError:  # compiled code may have no signature
            pass

    def _right(self, arguments: Arguments) -> Results:
        """Return what the formula gives in float32."""
        copies = _copied(arguments, torch.float32)
        for name, value in self.first.items():
            if isinstance(value, Tensor) and value.requires_grad:
                copies[name].requires_grad_()
        before = _copied({name: copies[name] for name in self.contract.writes})
        result = self.contract.plain(*copies.values())
        if self.contract.writes:
            return _changes(before, copies)
        outputs = result if isinstance(result, tuple) else (result,)
        gradients = [one.float() for one in self.operation.gradients]
        return self._results(outputs, _gradients_of(outputs, copies, gradients), copies)

    def _found(self, arguments: Arguments, counter: TorchFunctionMode | None = None) -> Results:
        """Return what the function gives; look at what it returns, what it changes and what it leaves running."""
        before, upstream = _copied(arguments), [one.clone() for one in self.operation.gradients]
        with said_of(self.file, "the forward pass raises "), self._context(), counter or nullcontext():
            result = self.function(*arguments.values())
        self._check_settings()
        if self.contract.writes:
            self._check_untouched(before, arguments, self.contract.writes)
            return _changes({name: before[name] for name in self.contract.writes}, arguments)
        outputs = self._outputs(result)
        values = tuple(one.detach().clone() for one in outputs)  # now: nothing may fill them in later
        with said_of(self.file, "the backward pass raises "):
            gradients = _gradients_of(outputs, arguments, upstream)
        self.held = [one for one in (*outputs, *gradients.values()) if one is not None]
        self._check_untouched(before, arguments)
        if any(not torch.equal(*pair) for pair in zip(upstream, self.operation.gradients, strict=True)):
            raise WrongError("its backward pass changes the output's gradient in place")
        return self._results(values, gradients, arguments)

    def _outputs(self, result: Any) -> tuple[Tensor, ...]:
        expected = self.operation.gradients
        outputs = result if isinstance(result, tuple) else (result,)
        if len(outputs) != len(expected):
            raise WrongError(f"it returns {len(outputs)} values; expected {self.contract.returns}")
        for i, (one, like) in enumerate(zip(outputs, expected, strict=True)):
            which = "it returns" if len(expected) == 1 else f"value {i + 1} of {len(expected)} is"
            if type(one) is not Tensor:
                forgotten = " (is there a return?)" if one is None else ""
                raise WrongError(f"{which} {kind_of(one)}, not a torch.Tensor{forgotten}")
            if (one.shape, one.dtype, one.device) != (like.shape, like.dtype, like.device):
                raise WrongError(f"{which} {_described(one)}; expected {_described(like)}")
            if not one.requires_grad:
                raise WrongError(
                    f"{which} a tensor without grad_fn: no gradient can flow back (detach, no_grad, .data or NumPy?)"
                )
        return outputs

    def _results(self, values: tuple[Tensor, ...], gradients: Mapping[str, Tensor | None], given: Arguments) -> Results:
        results = {"value" if len(values) == 1 else f"value {i + 1}": one for i, one in enumerate(values)}
        for name, gradient in gradients.items():
            if gradient is None:
                raise WrongError(f"no gradient reaches {name}: it is not used, or detached")
            if (gradient.shape, gradient.dtype) != (given[name].shape, given[name].dtype):
                raise WrongError(f"the gradient of {name} is {_described(gradient)}, not {_described(given[name])}")
            results[f"gradient of {name}"] = gradient
        return {name: one.detach() for name, one in results.items()}

    def _check_untouched(self, before: Arguments, after: Arguments, writes: tuple[str, ...] = ()) -> None:
        for name, value in after.items():
            pairs = zip(_tensors(before[name]), _tensors(value), strict=True)
            if name not in writes and any(not _same(*pair) for pair in pairs):
                raise WrongError(f"it changes its input {name} in place")

    def _compare(self, found: Results, right: Results, when: str) -> None:
        """Raise WrongError unless all results are the formula's: each as a whole, and each row of it."""
        for name, expected in right.items():
            one = found[name].double()
            if bad := int((~torch.isfinite(one)).sum()):
                raise WrongError(f"{when}{bad:,} of {one.numel():,} numbers of the {name} are NaN or infinite")
            off, row = agreement.off(one, expected.double()), _worst_row(one, expected.double())
            if torch.equal(one, expected.double()):
                continue
            if not off <= self.limit:
                nothing = ": nothing was changed" if self.contract.writes and not one.any() else ""
                raise WrongError(f"{when}the {name} is {off:.1e} off the formula's (at most {self.limit:.0e}){nothing}")
            if not row <= ROW * self.limit:
                raise WrongError(f"{when}a row of the {name} is {row:.1e} off the formula's")

    def _compare_repeated(self, again: Results, found: Results) -> None:
        for name, one in again.items():
            off = agreement.off(one, found[name].double())
            if not off <= REPEATED * self.limit and not torch.equal(one, found[name]):
                raise WrongError(
                    f"called again with the same inputs, the {name} is {off:.1e} off that of the first call: it is "
                    "random, or keeps something from one call for another"
                )

    def _check_settings(self) -> None:
        """Raise WrongError when a setting of PyTorch is no longer what it was, and set it back."""
        for name, (read, write) in SETTINGS.items():
            if (found := read()) != (before := self.settings[name]):
                write(before)
                raise WrongError(f"it changes PyTorch's {name} from {before} to {found}, for all that is timed")


class _Counter(TorchFunctionMode):
    """Count the calls of PyTorch's functions within it."""

    calls = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return function(*args, **(kwargs or {}))


def _gradients_of(
    outputs: tuple[Tensor, ...], arguments: Arguments, upstream: list[Tensor]
) -> dict[str, Tensor | None]:
    leaves = {name: one for name, one in arguments.items() if isinstance(one, Tensor) and one.requires_grad}
    found = torch.autograd.grad(outputs, tuple(leaves.values()), upstream, allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def _changes(before: Arguments, after: Arguments) -> Results:
    """Return by how much each tensor that is written has changed."""
    return {
        f"change of {name}[{i}]": new - old
        for name, values in before.items()
        for i, (old, new) in enumerate(zip(values, after[name], strict=True))
    }


def _worst_row(found: Tensor, right: Tensor) -> float:
    """Return the largest error of a row (of the last dimension), relative to its norm and that of all rows."""
    if right.ndim < 2:
        return 0.0
    rows = right.norm(dim=-1)
    return float(((found - right).norm(dim=-1) / (rows + rows.square().mean().sqrt())).nan_to_num(0.0).max())


def _tensors(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value] if isinstance(value, Tensor) else []


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _is_number(value: Any) -> bool:
    return not isinstance(value, list | Tensor)


def _copied(arguments: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    """Return the arguments with tensors of their own, those of numbers in another dtype if one is given."""

    def copied(value: Any) -> Any:
        if isinstance(value, list):
            return [copied(one) for one in value]
        if not isinstance(value, Tensor):
            return value
        one = value.detach().clone()
        return one.to(dtype) if dtype is not None and one.is_floating_point() else one

    return {name: copied(value) for name, value in arguments.items()}


@torch.no_grad()
def _fill(arguments: Arguments, values: Arguments) -> None:
    """Write other values into the same tensors."""
    for name, value in arguments.items():
        for target, source in zip(_tensors(value), _tensors(values[name]), strict=True):
            target.copy_(source)


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}"
