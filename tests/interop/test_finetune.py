"""`jpeft finetune`, from files to a folder that PEFT reads; and what interrupts it."""

import json
import re
import shutil
import sys

import jax
import pytest
from typer.testing import CliRunner

import jpeft
from jpeft_interop.base import load_adapted
from jpeft_interop.cli import main
from jpeft_interop.cli.app import app
from jpeft_interop.finetune import Settings, SettingsError
from jpeft_interop.metrics import MetricsLog
from jpeft_interop.snapshots import ResumeError, Snapshots
from jpeft_interop.tokenizer import load_tokenizer
from jpeft_interop.torch_check import differences, jax_logits, torch_logits
from tiny_folder import TEXT, write_folder

OPTIONS = [
    *["--steps", "6", "--save-every", "2", "--batch-size", "2", "--seq-len", "8", "--lr", "0.02", "--rank", "2"],
    *["--holdout", "0.2", "--targets", "q_proj,down_proj"],
]


def run(*arguments):
    return CliRunner().invoke(app, ["finetune", *map(str, arguments)])


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """Runs of the same model share their compiled programs."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models and three files of examples."""
    folder = tmp_path_factory.mktemp("place")
    write_folder(folder / "llama")
    write_folder(folder / "bert", "bert")
    (folder / "notes.txt").write_text("\n\n".join(" ".join(TEXT.split()[n:]) for n in range(8)))
    turns = [{"role": "user", "content": "a cat?"}, {"role": "assistant", "content": "no, the dog"}]
    (folder / "chats.jsonl").write_text("\n".join([json.dumps({"messages": turns})] * 4))
    rows = [
        f"{word} on the mat,{label}" for _ in range(5) for word, label in (("cat", "c"), ("dog", "d"), ("log", "l"))
    ]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    return folder


@pytest.fixture(scope="module")
def whole(place):
    """A run without interruption."""
    result = run(place / "llama", "--data", place / "notes.txt", "--out", place / "whole", *OPTIONS)
    assert result.exit_code == 0, result.output
    return place / "whole"


def files(out):
    return (out / "adapter" / "adapter_model.safetensors").read_bytes(), (out / "metrics.jsonl").read_text()


def agreement(model, out, architecture="AutoModelForCausalLM"):
    """The largest difference between PEFT's logits and ours, and how much the adapter does."""
    base, adapter = load_adapted(model, out / "adapter", dtype="float32")
    ids = [load_tokenizer(model).encode("the cat sat on the mat, no")]
    ours, plain = (jax_logits(base.forward, base.params, one, ids) for one in (adapter, None))
    theirs = torch_logits(model, out / "adapter", ids, architecture=architecture, labels=base.labels)
    return differences(ours, theirs, ids)[0].largest, differences(plain, theirs, ids)[0].largest


def test_a_run_leaves_an_adapter_its_figures_and_a_plot(place, whole):
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "training"] == [1, 2, 3, 4, 5, 6]
    first, last = (row for row in rows if row["kind"] == "held out")
    assert (first["step"], last["step"]) == (0, 6) and last["loss"] < first["loss"]
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["r"], config["lora_alpha"]) == ("CAUSAL_LM", 2, 4)
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    assert config["base_model_name_or_path"] == str(place / "llama")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_reads_what_was_trained(place, whole):
    difference, effect = agreement(place / "llama", whole)
    assert difference < 1e-4 < 0.01 < effect


class Interrupted(Exception):
    pass


def test_an_interrupted_run_ends_as_if_it_had_not_been(place, whole, monkeypatch):
    command = [place / "llama", "--data", place / "notes.txt", "--out", place / "halted", *OPTIONS]
    save = Snapshots.save

    def save_and_die(self, state, batches):
        save(self, state, batches)
        if int(state.step) == 4:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Snapshots, "save", save_and_die)
        assert isinstance(run(*command).exception, Interrupted)
    assert not (place / "halted" / "adapter").exists()
    with (place / "halted" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "training", "step": 5, "loss": 1.0}\n{"kind": "trai')  # died in the midst of a line
    result = run(*command)
    assert result.exit_code == 0 and "going on after step 4" in result.output
    assert files(place / "halted") == files(whole)


def test_what_a_run_has_noted_is_replaced_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"kind": "training", "step": n, "loss": 1.0 / n}) + "\n" for n in (1, 2, 3)))
    with path.open() as old:
        log = MetricsLog(path, 2)
        assert len(old.readlines()) == 3  # that file is not written to: one that is killed here has lost nothing
    assert log.losses == [1.0, 0.5] and len(path.read_text().splitlines()) == 2


def test_a_run_with_other_settings_is_refused_or_begun_anew(place, whole):
    command = [place / "llama", "--data", place / "notes.txt", *OPTIONS]
    refused = run(*command, "--out", place / "halted", "--seed", 1)
    assert isinstance(refused.exception, ResumeError) and "--no-resume" in str(refused.exception)
    anew = run(*command, "--out", place / "halted", "--no-resume", "--steps", 1)
    assert anew.exit_code == 0 and "going on" not in anew.output
    rows = [json.loads(line) for line in (place / "halted" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 1] and files(place / "halted") != files(whole)


def test_a_run_that_is_done_is_not_done_again(place, whole):
    before = files(whole)
    result = run(place / "llama", "--data", place / "notes.txt", "--out", whole, *OPTIONS)
    assert result.exit_code == 0 and "going on after step 6" in result.output and files(whole) == before


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_learns_and_torch_agrees(family, place):
    out = place / f"classifier-{family}"
    options = ["--steps", "30", "--batch-size", "4", "--seq-len", "16", "--lr", "0.02", "--holdout", "0.2", "--targets"]
    targets = {"bert": "query,value", "llama": "q_proj,v_proj"}[family]
    result = run(
        place / family, "--data", place / "reviews.csv", "--task", "classification", "--out", out, *options, targets
    )
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["accuracy"] == 1.0 and rows[-1]["loss"] < rows[0]["loss"]
    labels = json.loads((out / "labels.json").read_text())
    assert labels == {"id2label": {"0": "c", "1": "d", "2": "l"}, "label2id": {"c": 0, "d": 1, "l": 2}}
    difference, effect = agreement(place / family, out, "AutoModelForSequenceClassification")
    assert difference < 1e-4 < 0.01 < effect


def test_conversations_are_learnt(place):
    options = [
        *["--steps", "2", "--batch-size", "2", "--accumulate", "2", "--seq-len", "16", "--holdout", "0"],
        *["--rslora", "--dtype", "bfloat16", "--remat"],
    ]
    result = run(place / "llama", "--data", place / "chats.jsonl", "--out", place / "chats", *options)
    assert result.exit_code == 0, result.output
    counted = re.search(r"tokens learnt: assistant (\d+) of (\d+), user 0 of (\d+), template 0 of (\d+)", result.output)
    assert counted, result.output
    taught, assistant, user, template = map(int, counted.groups())
    tokenizer = load_tokenizer(place / "llama")
    ids = tokenizer.encode("<|user|>a cat?<|end|><|assistant|>no, the dog<|end|>")
    assert taught == assistant == 4 * len(tokenizer.encode("no, the dog<|end|>"))
    assert assistant + user + template == 4 * len(ids) and "without use" not in result.output
    rows = [json.loads(line) for line in (place / "chats" / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["training", "training"] and 0 < rows[0]["labels"] < 16
    config = json.loads((place / "chats" / "adapter" / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 7 and config["use_rslora"] and config["lora_alpha"] == 16


def test_all_is_learnt_where_it_is_asked_for_and_unused_fields_are_told(place, tmp_path, capsys, monkeypatch):
    shutil.copytree(place / "llama", tmp_path / "llama")
    hides = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' }}<|end|>{% endfor %}"
    (tmp_path / "llama" / "chat_template.jinja").write_text(hides)
    says = [{"role": role, "content": "a cat"} for role in ("user", "assistant")]
    rows = [{"text": "the dog"}, {"messages": says * 2, "id[red]": 1, "tools": [{"name": "f"}]}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [tmp_path / "llama", "--data", tmp_path / "chats.jsonl", "--out", tmp_path / "out"]
    options = ["--steps", "1", "--batch-size", "1", "--seq-len", "8", "--holdout", "0", "--targets", "q_proj"]
    code, error = told(capsys, monkeypatch, "finetune", *command, *options)
    error = " ".join(error.split())
    assert code == 1 and "chats.jsonl:2: " in error and "message 2" in error and "--train-on all" in error
    result = run(*command, *options, "--train-on", "all")
    output = " ".join(result.output.split())
    assert result.exit_code == 0, output
    tokens = lambda text: len(load_tokenizer(place / "llama").encode(text))
    document, talk = tokens("the dog<|end|>"), tokens("a cat<|end|><|end|>a cat<|end|>a cat<|end|>")
    assert f"tokens learnt: documents {document} of {document}, conversations {talk} of {talk}" in output
    assert "without use: id[red] (1 row), tools (1 row)" in output


def told(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["jpeft", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return exit.value.code, capsys.readouterr().err


BAD = {
    "no data": (["{place}/llama", "--data", "{place}/none.txt"], "none.txt"),
    "no model": (["{place}/none", "--data", "{place}/notes.txt"], "no such folder"),
    "no labels": (["{place}/bert", "--data", "{place}/notes.txt", "--task", "classification"], "a .txt has not"),
    "no such task": (["{place}/bert", "--data", "{place}/notes.txt"], "does not do causal-lm"),
    "no target": (["{place}/llama", "--data", "{place}/notes.txt", "--targets", "q_porj"], "q_porj"),
    "too few rows": (["{place}/llama", "--data", "{place}/notes.txt", "--batch-size", "9999"], "shorten the batch"),
    "share": (["{place}/llama", "--data", "{place}/notes.txt", "--holdout", "1.5"], "below 1; found 1.5"),
    "parts": (["{place}/llama", "--data", "{place}/notes.txt", "--accumulate", "3"], "into 3 equal parts"),
    "rate": (["{place}/llama", "--data", "{place}/notes.txt", "--lr", "0"], "lr must be above 0"),
}


@pytest.mark.parametrize("command", ["finetune", "sweep", "xlora"])
def test_what_is_learnt_of_conversations_is_a_choice(command):
    refused = CliRunner().invoke(app, [command, "model", "--train-on", "user"])
    assert refused.exit_code == 2 and "'assistant', 'all'" in " ".join(refused.output.split())
    with pytest.raises(SettingsError, match="train_on must be one of assistant, all; found 'user'"):
        Settings(jpeft.LoRA(), train_on="user")


@pytest.mark.parametrize("row", BAD)
def test_what_is_wrong_is_one_line(row, place, capsys, monkeypatch):
    arguments, message = BAD[row]
    arguments = [argument.format(place=place) for argument in arguments]
    code, err = told(capsys, monkeypatch, "finetune", *arguments, "--out", place / "bad", "--seq-len", 8)
    assert code == 1 and message in err and err.count("\n") == 1 and err.startswith("jpeft: ")
    assert not (place / "bad").exists()


# PEFT says so of its own AdaLoRA files too: it looks for the names with the tensor's at their end among modules.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["dora", "ia3", "adalora"])
def test_every_method_is_trained_and_read_by_peft(method, place):
    out = place / method
    options = [
        "--steps",
        "8",
        "--save-every",
        "4",
        "--batch-size",
        "2",
        "--seq-len",
        "8",
        "--holdout",
        "0.2",
        "--lr",
        "0.05",
    ]
    rank = [] if method == "ia3" else ["--rank", "2"]
    result = run(*[place / "llama", "--data", place / "notes.txt", "--out", out, "--method", method], *options, *rank)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first, last = (row for row in rows if row["kind"] == "held out")
    assert last["loss"] < first["loss"]
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())["peft_type"] == METHOD_TYPES[method]
    difference, effect = agreement(place / "llama", out)
    assert difference < 1e-4 < 0.01 < effect
    if method == "adalora":
        ranks = [row["rank"] for row in rows if row["kind"] == "training"]
        assert ranks[-1] <= 2 * len(last_ranks(rows)) < ranks[0]
        assert sum(last_ranks(rows).values()) == ranks[-1]
        assert (out / "ranks.png").read_bytes().startswith(b"\x89PNG")


METHOD_TYPES = {"dora": "LORA", "ia3": "IA3", "adalora": "ADALORA"}


def last_ranks(rows):
    return [row["ranks"] for row in rows if row["kind"] == "ranks"][-1]


def test_options_of_another_method_are_refused(place):
    command = [place / "llama", "--data", place / "notes.txt", "--out", place / "none"]
    for options, word in (
        (["--method", "ia3", "--alpha", 3], "--alpha has no meaning with --method ia3"),
        (["--method", "dora", "--initial-rank", 3], "--initial-rank has no meaning with --method dora"),
    ):
        result = run(*command, *options)
        assert result.exit_code == 2 and word in " ".join(result.output.replace("│", " ").split())
