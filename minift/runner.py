"""`BasicModelRunner`: the few lines in which a course finetunes a model by a paid service, on one's own machine.

    from minift import BasicModelRunner

    model = BasicModelRunner("bundled")
    print(model("What is the capital of Mexico?"))
    model.load_data_from_jsonlines("lamini_docs.jsonl", input_key="question", output_key="answer")
    model.train()
    print(model("What is the capital of Mexico?"))
    model.evaluate()

What the service hides can be read: `train` is `jobs.finetune`, a call is `generate.generate`, and `evaluate` hands out
what `evaluate.compare` found on the held-out pairs. Only names, and the keys of what `evaluate` returns, are the
service's. Read next: `runs/finetune.py`.
"""

import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, overload

from minift.checkpoint import load_model, save_model
from minift.config import FINETUNE, TrainConfig
from minift.data.records import Skipped, scan
from minift.errors import InputError, RunError
from minift.generate import Sampling, generate
from minift.prompts import CARRIED_MARKERS, Pair, Template, template_named
from minift.runs import finetune as jobs
from minift.runs.folder import check_free
from minift.runs.machine import choose_device
from minift.storage.names import model_path
from minift.tokenizer.base import check_fit
from minift.tokenizer.load import load_tokenizer
from minift.values import check_number

TEMPLATE_FILE = "template.txt"


class BasicModelRunner:
    """A model that can be called, given pairs, finetuned on them, and called again.

    Args:
        model_name: a folder or file in any format that minift knows; "bundled", the small base that comes with it; or
            a name on Hugging Face's hub, of a model that is in its cache on this machine.
        system_prompt: what the model is told before every question, in training, too.
        prompt_template: how a question is put: a name in `prompts.TEMPLATES`, a file of one's own, or a text that
            holds `{input}`. "auto": as it stands; once trained, as in training.
        device: auto, cpu or cuda.

    Raises:
        InputError: when there is no such model, template or device.
    """

    def __init__(
        self,
        model_name: str | Path = "bundled",
        system_prompt: str = "",
        prompt_template: str = "auto",
        device: str = "auto",
    ):
        self.model_name = str(model_name)
        self.system_prompt = system_prompt
        self.prompt_template = prompt_template
        self.device = device
        self._template(prompt_template)
        self._path = model_path(model_name)
        self._load(self._path)
        self._pairs: list[Pair] = []
        self._asked_as = "plain"  # the template that "auto" stands for; once trained, that of the training
        self._result: dict[str, Any] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def _load(self, path: Path) -> None:
        self.model = load_model(path, device=choose_device(TrainConfig(device=self.device)))
        self.tokenizer = load_tokenizer(path)
        check_fit(self.model.config, self.tokenizer)

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
        """What the model says behind a prompt; for a list of prompts, a list. The options are `generate.generate`'s.

        Raises:
            InputError: for an option out of bounds, or a prompt that is too long for the model.
        """
        sampling = Sampling(temperature, top_k, top_p, seed)
        prompts = [inputs] if isinstance(inputs, str) else inputs
        if not prompts:
            return []
        ids = generate(
            self.model, [self.tokenizer.encode(self._prompt(text)) for text in prompts], max_tokens, sampling
        )
        texts = [self.tokenizer.decode_continuation(answer).strip() for answer in ids]
        return texts[0] if isinstance(inputs, str) else texts

    def _prompt(self, text: str) -> str:
        """The whole prompt: the text, in the template."""
        text = text.rstrip()  # as in training: no prompt ends in a space
        name = self._asked_as if self.prompt_template == "auto" else self.prompt_template
        if text.endswith(CARRIED_MARKERS):  # it brings its template with it
            name = "carried"
        return self._template(name).format(Pair(text, answer="", system=self.system_prompt))[0]

    def _template(self, name: str) -> Template:
        if "{input}" in name:
            prompt = name.replace("{input}", "{question}").rstrip()
            return Template(prompt, "\n{answer}", prompt, system="{system}")
        return template_named("plain" if name == "auto" else name)

    # Data -------------------------------------------------------------------------------------------------------------

    def load_data(
        self, data: Iterable[Mapping[str, Any]], input_key: str = "input", output_key: str = "output"
    ) -> None:
        """Add pairs to train on, from dictionaries. A few that hold no text are skipped and reported (`Skipped`).

        Raises:
            InputError: when a record has not both keys (it lists those that are there), or more than 1 % of them cannot
                be used. Nothing is added then.
        """
        named = ((values, f"record {number}") for number, values in enumerate(data, start=1))
        self._add(named, input_key, output_key)

    def load_data_from_jsonlines(
        self, file_path: str | Path, input_key: str = "input", output_key: str = "output"
    ) -> None:
        """Add pairs to train on, from a file of JSON Lines (packed or not), or a JSON array. Raises as `load_data`."""
        self._add(_named(file_path), input_key, output_key)

    def load_data_from_csv(self, file_path: str | Path, input_key: str = "input", output_key: str = "output") -> None:
        """Add pairs to train on, from a CSV file whose first row names the columns. Raises as `load_data`."""
        self._add(_named(file_path), input_key, output_key)

    def load_data_from_dataframe(self, df: Any, input_key: str = "input", output_key: str = "output") -> None:
        """Add pairs to train on, from a pandas DataFrame. Raises as `load_data`."""
        self.load_data(df.to_dict(orient="records"), input_key, output_key)

    def clear_data(self) -> None:
        """Forget the pairs."""
        self._pairs = []

    def _add(
        self, records: Iterable[tuple[Mapping[str, Any], str] | InputError], input_key: str, output_key: str
    ) -> None:
        skipped, pairs = Skipped(), list[Pair]()
        for item in records:
            skipped.records += 1
            pair = item if isinstance(item, InputError) else _pair(*item, input_key, output_key)
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
        """Finetune all the weights of the model that the runner began with on the pairs, or on the first `limit`.

        Args:
            is_public: who may see the result at the service; here nobody else can.
            out: a folder to make, which keeps the pairs and the run (`runs/finetune.py`); by default a temporary one.
            options: those of `TrainConfig`, as `minift finetune` has them: epochs, steps, lr, batch_size, …

        Raises:
            InputError: when there are fewer than two pairs, for an unknown option or a value out of bounds.
            RunError: when training cannot go on, or was interrupted.
        """
        known = [item.name for item in dataclasses.fields(TrainConfig)]
        if unknown := sorted(set(options) - set(known)):
            raise InputError(f"train has no option {unknown[0]!r}; known: limit, out, {', '.join(known)}")
        if limit is not None:
            check_number("limit", limit, least=1)
        pairs = self._pairs[:limit]
        if len(pairs) < 2:
            raise InputError(f"{len(pairs)} pairs to train on; load at least 2 (a tenth is held out)")
        config = FINETUNE.replace(**{"device": self.device, **options})
        if out is None:
            self._folder = tempfile.TemporaryDirectory(prefix="minift-")  # removed with the runner
        folder = Path(self._folder.name if out is None and self._folder else str(out))
        check_free(folder)
        if "template" not in options and self.prompt_template != "auto":
            config = config.replace(template=self.prompt_template)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if "{input}" in config.template:
                text = self._template(config.template)
                (folder / TEMPLATE_FILE).write_text(text.prompt + text.answer, encoding="utf-8")
                config = config.replace(template=str(folder / TEMPLATE_FILE))
            lines = [json.dumps(self._record(pair), ensure_ascii=False) + "\n" for pair in pairs]
            (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            raise InputError(f"{folder}: cannot be written: {error.strerror or error}") from None
        run = folder / "run"
        result = jobs.finetune(jobs.finetune_job(str(self._path), [str(folder / "pairs.jsonl")]), config, run)
        if result is None:
            raise RunError(f"interrupted; what was reached is saved in {run}")
        self._load(run / "final")
        self._result, self._asked_as = result, result["template"]
        if self._asked_as == "carried":  # the pairs brought a template with them: a question without it is put into it
            self._asked_as = "alpaca" if pairs[0].question.endswith("### Response:") else "qa"

    def _record(self, pair: Pair) -> dict[str, str]:
        record = {"question": pair.question, "answer": pair.answer}
        return record | {"system": self.system_prompt} if self.system_prompt else record

    def evaluate(self) -> dict[str, Any]:
        """The base and the trained model side by side, on the pairs that were held out of training.

        Returns:
            `eval_results`, as the service has it: for each question its `input` and two `outputs`, the trained model's
            and the base's, each with a `model_name` and an `output`; here also the right `answer`. `before` and
            `after`: the scores of the two (`evaluate.evaluate`).

        Raises:
            InputError: before `train`.
        """
        if not self._result:
            raise InputError("nothing to compare yet: call train first")
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


def _named(file: str | Path) -> Iterator[tuple[Mapping[str, Any], str] | InputError]:
    for item in scan(file):
        yield item if isinstance(item, InputError) else (item.values, item.where)


def _pair(values: Mapping[str, Any], where: str, input_key: str, output_key: str) -> Pair | InputError:
    """The pair of a record, or what is wrong with it. Raises InputError for a key that is not there."""
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
    return Pair(texts[0].rstrip(), texts[1].strip(), where=where)
