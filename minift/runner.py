"""`BasicModelRunner`: the few lines of a course that finetunes a model with a paid service, on your own machine.

    from minift import BasicModelRunner

    model = BasicModelRunner("bundled")
    print(model("What is the capital of Mexico?"))
    model.load_data_from_jsonlines("lamini_docs.jsonl", input_key="question", output_key="answer")
    model.train()
    print(model("What is the capital of Mexico?"))
    model.evaluate()

What the service hides can be read here: a call is `generate.generate`, `train` is `runs.finetune.finetune`, and
`evaluate` returns what `evaluation.evaluate.compare` found on the held-out pairs. Only the names, and the keys of what
`evaluate` returns, are the service's.

Read next: `reference.py`.
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, overload

from minift import kernels
from minift.checkpoint import load_model, save_model
from minift.config import FINETUNE, TrainConfig, not_given
from minift.data.chats import read_turns
from minift.data.conversations import CHAT_FIELDS
from minift.data.encodings import check_encoding
from minift.data.records import Skipped, scan
from minift.data.templates import carried_template, template_named
from minift.data.written import record_of
from minift.errors import InputError, RunError
from minift.generate import Sampling, generate
from minift.pack import encode_prompt
from minift.prompts import Chat, Conversation, Pair, Span, Template, TextTemplate
from minift.runs import finetune as jobs
from minift.runs.folder import check_free, read_run
from minift.runs.machine import choose_device
from minift.storage.names import model_path
from minift.tokenizer.chat import has_chat_template, stop_at_turns
from minift.tokenizer.load import check_fit, load_tokenizer
from minift.values import check_number

TEMPLATE_FILE = "template.txt"


class BasicModelRunner:
    """A model that can be called, given pairs, finetuned on them, and called again.

    Args:
        model_name: a folder or file in any format that minift knows; "bundled", the small base that comes with minift;
            or a name on Hugging Face's hub, if the model is in the hub's cache on this machine.
        system_prompt: a text before every question, also in training.
        prompt_template: the text around a question: a name in `prompts.TEMPLATES`, a file of your own, or a text that
            contains `{input}`; "chat" is the model's own. "auto": the model's own, if it has one, else nothing around
            it; after training, the template of the training.
        device: auto, cpu or cuda.
        plain: run the pages as they are read, without the faster code of `kernels/`.

    Raises:
        InputError: when there is no such model, template or device.
    """

    def __init__(
        self,
        model_name: str | Path = "bundled",
        system_prompt: str = "",
        prompt_template: str = "auto",
        device: str = "auto",
        plain: bool = False,
    ):
        self.model_name = str(model_name)
        self.system_prompt = system_prompt
        self.prompt_template = prompt_template
        self.device = device
        self.plain = plain
        self._path = model_path(model_name)
        self.tokenizer = load_tokenizer(self._path)
        self._template(prompt_template)  # refuse a wrong one before the model is loaded
        self._load(self._path)
        self._pairs: list[Conversation] = []
        self._auto_template = "chat" if has_chat_template(self.tokenizer) else "plain"  # what "auto" means
        self._result: dict[str, Any] = {}
        self._trained = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def _load(self, path: Path) -> None:
        self.model = load_model(path, device=choose_device(TrainConfig(device=self.device)))
        check_fit(self.model.config, self.tokenizer)
        if not self.plain:
            kernels.install(self.model, kernels.choose_for_reading(self.model.device))

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        model = f"{self.model_name!r}: {parameters:,} parameters on {self.model.device}"
        pairs = f"{len(self._pairs):,} pair{'s' * (len(self._pairs) != 1)}"
        return f"<BasicModelRunner {model}, {pairs}, {'trained' if self._trained else 'not trained'}>"

    # Asking -----------------------------------------------------------------------------------------------------------

    @overload
    def __call__(self, inputs: str, *options: Any, **named: Any) -> str: ...
    @overload
    def __call__(self, inputs: list[str], *options: Any, **named: Any) -> list[str]: ...
    def __call__(
        self,
        inputs: str | list[str],
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str | list[str]:
        """Return the model's answer to a prompt; for a list of prompts, a list of answers.

        Args:
            max_tokens: the largest number of tokens of an answer.
            temperature, top_k, top_p, seed: as in `generate.Sampling`; by default greedy.

        Raises:
            InputError: for an option out of bounds, or a prompt that is too long for the model.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        prompts = [inputs] if isinstance(inputs, str) else inputs
        if not prompts:
            return []
        stop_at_turns(self.model, self._template(self._name_of("")), self.tokenizer)
        prompt_ids = [encode_prompt(self._prompt(text), self.tokenizer) for text in prompts]
        answer_ids = generate(self.model, prompt_ids, max_tokens, sampling, self.plain)
        texts = [self.tokenizer.decode_continuation(ids).strip() for ids in answer_ids]
        return texts[0] if isinstance(inputs, str) else texts

    def _prompt(self, text: str) -> list[Span]:
        """Return the complete prompt: the text in the template, as in training."""
        return self._template(self._name_of(text)).prompt(Pair(text, answer="", system=self.system_prompt))

    def _name_of(self, text: str) -> str:
        """Return the name of a text's template: it may have its template in it already."""
        if carried_template(text):
            return "carried"
        return self._auto_template if self.prompt_template == "auto" else self.prompt_template

    def _template(self, name: str) -> Template:
        if "{input}" in name:
            return _own_template(name)
        return template_named("plain" if name == "auto" else name, self.tokenizer)

    # Data -------------------------------------------------------------------------------------------------------------

    def load_data(
        self, data: Iterable[Mapping[str, Any]], input_key: str = "input", output_key: str = "output"
    ) -> None:
        """Add pairs to train on, from dictionaries, or chats: records that hold `messages` (`data/chats.py`).

        A few records that cannot be used are skipped and reported (`Skipped`).

        Raises:
            InputError: when a record does not have both keys, or more than 1 % of them cannot be used. Then nothing is
                added.
        """
        named = ((values, f"record {number}") for number, values in enumerate(data, start=1))
        self._add(named, input_key, output_key)

    def load_data_from_jsonlines(
        self, file_path: str | Path, input_key: str = "input", output_key: str = "output", encoding: str = "utf-8"
    ) -> None:
        """Add pairs or chats, from JSON Lines (also compressed), a JSON array or Parquet. Raises as `load_data`."""
        self._add(_named(file_path, encoding), input_key, output_key)

    def load_data_from_csv(
        self, file_path: str | Path, input_key: str = "input", output_key: str = "output", encoding: str = "utf-8"
    ) -> None:
        """Add pairs to train on, from a CSV file whose first row names the columns. Raises as `load_data`."""
        self._add(_named(file_path, encoding), input_key, output_key)

    def load_data_from_dataframe(self, df: Any, input_key: str = "input", output_key: str = "output") -> None:
        """Add pairs to train on, from a pandas DataFrame. Raises as `load_data`."""
        self.load_data(df.to_dict(orient="records"), input_key, output_key)

    def clear_data(self) -> None:
        """Remove all pairs."""
        self._pairs = []

    def _add(
        self, records: Iterable[tuple[Mapping[str, Any], str] | InputError], input_key: str, output_key: str
    ) -> None:
        skipped, pairs = Skipped(), list[Conversation]()
        for record in records:
            skipped.records += 1
            pair = record if isinstance(record, InputError) else _conversation(*record, input_key, output_key)
            if isinstance(pair, InputError):
                skipped.add(pair)
            else:
                pairs.append(pair)
        skipped.check()
        self._pairs += pairs

    # Training ---------------------------------------------------------------------------------------------------------

    def train(
        self, limit: int | None = None, is_public: bool = False, out: str | Path | None = None, **options: Any
    ) -> None:
        """Finetune the model that the runner was made with on the pairs, or on the first `limit` of them.

        Args:
            is_public: at the service, who may see the result; here it has no effect.
            out: a folder to make, which keeps the pairs and the run (`runs/folder.py`); by default a temporary one.
            options: those of `TrainConfig`, which are the flags of `minift finetune`: epochs, steps, lr, batch_size, …

        Raises:
            InputError: when there are fewer than two pairs, for an unknown option or a value out of bounds.
            RunError: when training cannot go on, or was interrupted. Where only the comparison with the base was, the
                runner has the trained model.
        """
        known = [item.name for item in dataclasses.fields(TrainConfig) if item.name != "limit"]
        if unknown := sorted(set(options) - set(known)):
            raise InputError(f"train has no option {unknown[0]!r}; known: limit, out, {', '.join(known)}")
        if limit is not None:
            check_number("limit", limit, least=1)
        pairs = self._pairs[:limit]
        if len(pairs) < 2:
            raise InputError(f"{len(pairs)} pairs to train on; load at least 2 (a tenth is held out)")
        config = FINETUNE.replace(**{"device": self.device, **options})
        carried = any(carried_template(pair.question) for pair in pairs)
        if "template" not in options and (self.prompt_template != "auto" or not carried):
            asked_in = self._auto_template if self.prompt_template == "auto" else self.prompt_template
            config = config.replace(template="auto" if asked_in == "plain" else asked_in)
        if out is None:
            self._folder = tempfile.TemporaryDirectory(prefix="minift-")  # removed with the runner
        folder = Path(self._folder.name if out is None and self._folder else str(out))
        data, template = self._write_inputs(folder, pairs, config.template)
        run = folder / "run"
        job = jobs.finetune_job(str(self._path), [str(data)])
        config, choose = config.replace(template=template), not_given(options)
        interrupted = False
        try:
            result = jobs.finetune(job, config, run, plain=self.plain, choose=choose)
        except RunError:
            if not (run / "final").is_dir():
                raise
            result, interrupted = {}, True
        if result is None:
            raise RunError(f"interrupted; the finished steps are saved in {run}")
        self.tokenizer = load_tokenizer(run / "final")
        self._load(run / "final")
        self._result, self._trained, self._auto_template = result, True, read_run(run)[2].template
        if self._auto_template == "carried":  # the pairs have their template in them: a new question is given the same
            self._auto_template = carried_template(pairs[0].question) or "carried"
        if interrupted:
            raise RunError("the comparison with the base was not made; the runner answers with the trained model")

    def _write_inputs(self, folder: Path, pairs: list[Conversation], template: str) -> tuple[Path, str]:
        """Write what a run reads to a new folder; return the file of pairs and the template's name or file."""
        check_free(folder)
        data, template_file = folder / "pairs.jsonl", folder / TEMPLATE_FILE
        records = [record_of(pair, self.system_prompt) for pair in pairs]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            data.write_text("".join(lines), encoding="utf-8")
            if "{input}" in template:
                own = _own_template(template)
                template_file.write_text(own.question + own.answer, encoding="utf-8")
                template = str(template_file)
        except OSError as error:
            raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from None
        return data, template

    def evaluate(self) -> dict[str, Any]:
        """Return the answers and scores of the base and the trained model, on the pairs held out of training.

        Returns:
            `eval_results`, in the service's form: for each question its `input` and two `outputs`, the trained model's
            and the base's, each with a `model_name` and an `output`; in addition the right `answer`. `before` and
            `after`: the scores of the two (`evaluation.evaluate.Evaluation.to_dict`).

        Raises:
            InputError: before `train`.
        """
        if not self._result:
            why = "train has made no comparison (compare=0)" if self._trained else "call train first"
            raise InputError(f"nothing to compare yet: {why}")
        results = [
            {
                "input": sample["question"],
                "outputs": [
                    {"model_name": f"{self.model_name}, finetuned", "output": sample["after"]},
                    {"model_name": self.model_name, "output": sample["before"]},
                ],
                "answer": sample["answer"],
            }
            for sample in self._result["samples"]
        ]
        return {"eval_results": results, "before": self._result["before"], "after": self._result["after"]}

    def save(self, path: str | Path) -> None:
        """Write the model and its tokenizer to a folder, a minift checkpoint.

        Raises:
            InputError: when the path exists.
            RunError: when the disk refuses.
        """
        if Path(path).exists():
            raise InputError(f"{path}: exists; choose another name")
        save_model(path, self.model, self.tokenizer)


def _own_template(text: str) -> TextTemplate:
    """Return the template of a text that contains `{input}`."""
    question = text.replace("{input}", "{question}").rstrip()
    return TextTemplate(question, "\n{answer}", question, system="{system}")


def _named(file: str | Path, encoding: str) -> Iterator[tuple[Mapping[str, Any], str] | InputError]:
    """Yield each record of a file with the words that name its place."""
    for item in scan(file, check_encoding(encoding)):
        yield item if isinstance(item, InputError) else (item.values, item.where)


def _conversation(values: Mapping[str, Any], where: str, input_key: str, output_key: str) -> Conversation | InputError:
    """Return the pair or chat of a record, or what is wrong with it. Raises InputError for a key that is missing."""
    chat = next((key for key in CHAT_FIELDS if isinstance(values.get(key), list)), "")
    if chat and not {input_key, output_key} & values.keys():
        try:
            return Chat(read_turns(values[chat], f"{where}: {chat!r}"), where=where)
        except InputError as fault:
            return fault
    texts = []
    for key in (input_key, output_key):
        if key not in values:
            there = ", ".join(map(repr, values)) or "none"
            raise InputError(f"{where}: no key {key!r}; its keys: {there} (see input_key and output_key)")
        text = values[key]
        if not isinstance(text, str) or not text.strip():
            state = "empty" if isinstance(text, str) else f"{type(text).__name__}, not a text"
            return InputError(f"{where}: {key!r} is {state}")
        texts.append(text)
    return Pair(texts[0], texts[1], where=where)
