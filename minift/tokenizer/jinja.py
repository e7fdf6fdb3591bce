"""Jinja in a sandbox: a chat template's text, rendered as `transformers` renders it, within bounds.

A model's template is a small program that came with its folder, and it need not be trusted. Jinja's sandbox keeps it
away from Python's insides. It knows no `while`, but nested loops and a text that is doubled again and again need no
`while` to use all the time and memory there is. So the template's syntax tree is changed before it is compiled: every
round of a loop, every macro and every text that it makes is paid for from a *budget* that each rendering gets anew.

    {% for message in messages %}{{ message.role ~ ': ' ~ message.content }}{% endfor %}
    rounds: the messages (ROUND each); texts: what `~` makes, and what is written

The extra `chat` installs the package `jinja2`. Import this module only after `errors.need` has found it.
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from minift.errors import InputError, one_line

BUDGET = 1 << 27  # characters that one rendering may make, in all its steps
ROUND = 64  # characters that one round of a loop costs
SECONDS = 20.0  # of computing, for what makes no text; an ordinary rendering takes a ten-thousandth of it
WIDEST = 1_000_000  # no number that a template gives to a function, such as a width, is larger
_WIDE = re.compile(r"\d{7}|\*")  # the width of a format such as "%9999999d"


class _RefusalError(Exception):
    """The words of a template's `raise_exception`."""


class _TooMuchError(Exception):
    """A template's budget is used up."""


class Renderer:
    """One compiled template.

    Args:
        source: the template.
        where: the template's file, for messages.
        variables: what the template sees by name besides the messages, such as `bos_token`.
        now: the time that `strftime_now` writes. It stays the same, so that all texts of a run have the same date.

    Raises:
        InputError: with the file and the line, for a template that Jinja cannot read.
    """

    def __init__(self, source: str, where: str, variables: Mapping[str, str], now: datetime):
        self._where, self._variables = where, dict(variables)
        self._environment = _Environment(now)
        try:
            tree = self._environment.parse(source)
            self._loop = _growing_loop(tree)
            tree = _Paid().visit(tree)
            if self._loop is not None:
                self._loop.body.insert(0, _statement("begin_round"))
            code = self._environment.compile(tree, where, where)
            self._template = jinja2.Template.from_code(self._environment, code, self._environment.make_globals(None))
        except jinja2.TemplateSyntaxError as error:
            raise InputError(one_line(f"{where}:{error.lineno}: not a chat template: {error.message}")) from None
        except Exception as error:  # the compiler runs a template's constants, so it may meet any error of theirs
            raise InputError(one_line(f"{where}: not a chat template: {_words(error)}")) from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        conversation: str,
        marks: tuple[str, str] = ("", ""),
    ) -> str:
        """Return the text of messages.

        Args:
            add_generation_prompt: whether to write what comes before the next answer.
            conversation: the conversation's `file:line`, for messages.
            marks: what to write before and after each text that the template marks with `{% generation %}`.

        Raises:
            InputError: when the template refuses the messages, fails, or uses up its budget.
        """
        environment, parts, length = self._environment, list[str](), 0
        environment.starts, environment.written = [], 0
        environment.begin(marks)
        variables = {**self._variables, "messages": messages, "tools": None, "documents": None}
        try:
            for part in self._template.generate(**variables, add_generation_prompt=add_generation_prompt):
                parts.append(part)
                length += len(part)
                environment.written = length
                if length > BUDGET:
                    raise _TooMuchError
            return "".join(parts)
        except _RefusalError as refusal:
            reason = f"the chat template refuses this conversation: {refusal}"
        except _TooMuchError:
            reason = "the chat template takes too much time or memory for this conversation"
            reason = f"{self._where}: {reason}; a template must end within {SECONDS:g} s and {BUDGET:,} characters"
        except Exception as error:
            line = _line(error, self._where)
            reason = f"the chat template fails at {self._where}{line}: {_words(error)}"
        raise InputError(one_line(f"{conversation}: {reason}"))

    @property
    def starts(self) -> list[int] | None:
        """Return where each message begins in the text that was rendered last; None unless the text grows by messages.

        Then the text of fewer messages is the same up to the end of the last of them, and what follows the messages
        does not depend on them.
        """
        return None if self._loop is None else self._environment.starts


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as `transformers` sets it up, with a budget."""

    intercepted_binops = frozenset(["*", "**", "%"])  # "+" is paid for by `_Paid`

    def __init__(self, now: datetime):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.begin(("", ""))
        self.filters["tojson"] = _tojson
        self.filters["paid"], self.filters["pay"] = self.paid, self.pay
        self.starts: list[int] = []
        self.written: int = 0  # characters of this rendering
        self.filters["begin_round"] = lambda _: self.starts.append(self.written)
        for name in ("center", "indent", "batch", "slice", "format"):
            self.filters[name] = _with_bounds(self.filters[name])
        self.globals.pop("lipsum")
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = now.strftime

    def begin(self, marks: tuple[str, str]) -> None:
        """Begin a rendering, with all of its budget."""
        self.marks, self._left, self._deadline = marks, BUDGET, time.thread_time() + SECONDS

    def pay(self, _: object, characters: int) -> None:
        """Take characters from the budget. Raise _TooMuchError when it is used up, or the time."""
        self._left -= characters
        if self._left < 0 or time.thread_time() > self._deadline:
            raise _TooMuchError

    def paid(self, value: Any) -> Any:
        """Return a value that was made, and pay for it."""
        self._left -= _size(value)
        if self._left < 0:
            raise _TooMuchError
        return value

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or a method of the template's values."""
        _check_bounds(args, kwargs)
        return self.paid(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiply, raise to a power or format, unless the result is too large."""
        if operator == "*" and not isinstance(left, float) and not isinstance(right, float):
            for sequence, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(sequence, int) and _size(sequence) * times > self._left:
                    raise _TooMuchError
        if operator == "**" and isinstance(left, int) and left.bit_length() * abs(right) > 4096:
            raise _TooMuchError
        if operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise _TooMuchError
        return self.paid(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Any:
        """Return a text's own `format` in the sandbox, without fields of a great width."""
        text = getattr(value, "__self__", None)
        if isinstance(text, str) and re.search(r":[^}]*(\d{7}|\{)", text):
            raise _TooMuchError
        return super().wrap_str_format(value)


class _Paid(NodeTransformer):
    """The change of a syntax tree after which each round and each text that is made is paid for."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        return self._paid_body(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._paid_body(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        return self._paid_body(node)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [part if isinstance(part, nodes.TemplateData) else _paid(part) for part in node.nodes]
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802
        return _paid(self._sum(node))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        return _paid(self.generic_visit(node))

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return node if node.node is None else _paid(node)  # without a node it is the filter of a block

    def _sum(self, node: nodes.Add) -> nodes.Node:
        """Change what is added. Only the sum is paid for: it is as long as all that is on the way to it."""
        for side in ("left", "right"):
            term = getattr(node, side)
            setattr(node, side, self._sum(term) if isinstance(term, nodes.Add) else self.visit(term))
        return node

    def _paid_body(self, node: Any) -> Any:
        self.generic_visit(node)
        price = ROUND + sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        node.body.insert(0, _statement("pay", nodes.Const(price)).set_lineno(node.lineno))
        return node


def _statement(name: str, *arguments: nodes.Expr) -> nodes.Node:
    """Return a statement that calls a filter of the environment."""
    # A filter is called directly, a function with the sandbox's checks. Of a constant it would be called only once.
    return nodes.ExprStmt(nodes.Filter(nodes.EnvironmentAttribute("marks"), name, [*arguments], [], None, None))


_GROWING = ("index", "index0", "first")  # what a loop may ask of itself without knowing what comes later
_STATEFUL = ("messages", "loop", "namespace", "cycler", "joiner", "self", "caller")
_ITERATORS = ("map", "select", "reject", "selectattr", "rejectattr", "batch", "slice")  # each is used up by its use
_PARTS = (nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.NSRef)


def _growing_loop(tree: nodes.Template) -> nodes.For | None:
    """Return the loop over the messages of a template whose text grows by messages; None for any other.

    It asks for the messages in this one loop and, by `messages[0]`, for the first. The loop does not ask how many there
    are, what comes next, or for what ends the text, and it leaves no trace: what it sets is gone after each round.
    """
    loops = [node for node in tree.body if isinstance(node, nodes.For) and getattr(node.iter, "name", "") == "messages"]
    if len(loops) != 1 or loops[0].recursive or loops[0].else_ or loops[0].test:
        return None
    allowed = {id(loops[0].iter)}
    for item in tree.find_all(nodes.Getitem):
        if isinstance(item.arg, nodes.Const) and item.arg.value == 0 and getattr(item.node, "name", "") == "messages":
            allowed.add(id(item.node))
    for attribute in tree.find_all(nodes.Getattr):
        if attribute.attr in _GROWING and getattr(attribute.node, "name", "") == "loop":
            allowed.add(id(attribute.node))
    if any(name.name in _STATEFUL and id(name) not in allowed for name in tree.find_all(nodes.Name)):
        return None
    if any(name.name == "add_generation_prompt" for name in loops[0].find_all(nodes.Name)):
        return None
    values = [assigned.node for assigned in tree.find_all(nodes.Assign)]
    filters = [one for value in values for one in (value, *value.find_all(nodes.Filter))]
    if any(isinstance(one, nodes.Filter) and one.name in _ITERATORS for one in filters):
        return None
    return None if any(tree.find_all(_PARTS)) else loops[0]


class _Generation(Extension):
    """The tag `{% generation %} … {% endgeneration %}` around what the model writes."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

    def parse(self, parser: Any) -> nodes.Node:
        """Read the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        before, after = self.environment.marks  # type: ignore[attr-defined]
        return f"{before}{caller()}{after}"


class _Namespace(Namespace):
    """Jinja's `namespace`, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without a name for self, which a template may use
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """The parts of `dict` that a template may use."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Return a dictionary with these keys."""
        return dict.fromkeys(*args)


def _paid(node: Any) -> nodes.Filter:
    paid = nodes.Filter(node, "paid", [], [], None, None)
    paid.set_lineno(node.lineno)
    return paid


def _size(value: Any) -> int:
    """Return about how many characters a value takes, those of a list's texts included."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(len(item) if isinstance(item, str) else 1 for item in value)
    return value.bit_length() // 64 if isinstance(value, int) else 1


def _check_bounds(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > WIDEST:
            raise _TooMuchError


def _with_bounds(function: Any) -> Any:
    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_bounds(args, kwargs)
        if args and isinstance(args[0], str) and function.__name__ == "do_format" and _WIDE.search(args[0]):
            raise _TooMuchError
        return function(*args, **kwargs)

    return bounded


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return a value as JSON. (Jinja's own filter writes it for HTML.)"""
    _check_bounds((indent,), {})
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise _RefusalError(message)


def _words(error: BaseException) -> str:
    """Return what an error says, and of which kind it is unless it is Jinja's own."""
    words, name = str(error), type(error).__name__
    return words if words and isinstance(error, jinja2.TemplateError) else f"{name}: {words}" if words else name


def _line(error: BaseException, where: str) -> str:
    """Return ":line" of the template in which an error was raised, or ""."""
    line, frame = "", error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == where:
            line = f":{frame.tb_lineno}"
        frame = frame.tb_next
    return line
