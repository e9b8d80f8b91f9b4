"""lm-eval's own machinery around a model of the zoo: requests, tasks, files and errors."""

import csv
import json
import math
import re
import shlex
import tomllib
from pathlib import Path

import lightning
import pytest
import torch

import archzoo
from archzoo.checkpoint import Pretrained, load
from archzoo.cli import main
from archzoo.generation import generate
from archzoo.tasks import Addition, Text
from archzoo.tasks.tokenizers import CharacterTokenizer, learn_bpe
from archzoo.training.module import LanguageModel

pytestmark = pytest.mark.extras
lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from archzoo.evaluation import command, documents  # noqa: E402
from archzoo.evaluation.harness import ArchzooLM  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path.stem for path in command.SHIPPED.glob("*.yaml"))
TEXT = (ROOT / "data" / "shakespeare.txt").read_text()[:60_000]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nor the seconds that lm-eval takes to describe the machine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets.config
    import huggingface_hub.constants

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")


def model_of(tokenizer, name="retnet_micro", context_length=64, **arguments):
    torch.manual_seed(1)
    net = archzoo.create_model(
        name, vocab_size=tokenizer.vocab_size, context_length=context_length, **arguments
    )
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter *= 4
    return Pretrained(net.eval(), tokenizer, None)


@pytest.fixture(scope="module")
def characters():
    return CharacterTokenizer("".join(sorted(set(TEXT))))


@pytest.fixture(scope="module")
def words():
    return model_of(learn_bpe([TEXT], 400))


def asked(kind, *arguments, task="own", number=0):
    return Instance(kind, {}, arguments, 0, metadata=(task, number, 1))


def likelihood(lm, *pairs):
    return lm.loglikelihood([asked("loglikelihood", *p, number=n) for n, p in enumerate(pairs)])


def written(lm, prompts, **settings):
    return lm.generate_until(
        [asked("generate_until", p, settings, number=n) for n, p in enumerate(prompts)]
    )


# ---------------------------------------------------------------------------- whole texts


@pytest.mark.parametrize("prefix", [None, "", "e"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 66, 128, 200])
def test_each_token_is_scored_in_one_window(words, prefix, length):
    lm = ArchzooLM(words, prefix=prefix)
    tokens = words.tokenizer.encode(TEXT)[:length]
    text = words.tokenizer.decode(tokens)
    tokens = words.tokenizer.encode(text)
    windows = lm.windows(text)
    begun = [] if prefix == "" else words.tokenizer.encode(prefix or "\n")
    whole = begun + tokens
    assert [token for _, scored in windows for token in scored] == whole[1:]
    end = 1
    for context, scored in windows:
        end += len(scored)
        read = [*context, *scored]
        assert read == whole[end - len(read) : end]  # what stands before, and nothing else
        assert len(read) - 1 <= 64
    if len(whole) > 65:
        assert all(len([*context, *scored]) - 1 == 64 for context, scored in windows)


def test_whole_texts_are_scored_as_their_windows_and_as_by_the_test_command(tmp_path, characters):
    """On a test part of whole windows, which both cut alike where nothing stands before it."""
    found = model_of(characters)
    size = 64 * 40 + 1
    part, before = TEXT[30_000 : 30_000 + size], TEXT[: TEXT.index("\n", 20_000) + 1]
    path = tmp_path / "text.txt"
    path.write_text(before + part)
    task = Text(
        str(path), characters, context_length=64, batch_size=4, cache_dir=str(tmp_path / "cache"),
        test_fraction=(size + 0.5) / len(before + part),
    )  # fmt: skip
    task.prepare()
    assert task.rows("test") == 40
    module = LanguageModel("retnet_micro")
    module.decoder = found.model
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    logged = trainer.test(module, task, verbose=False)[0]
    lm = ArchzooLM(found, prefix="", batch_size=7)
    (nats,) = lm.loglikelihood_rolling([asked("loglikelihood_rolling", part)])
    assert -nats == pytest.approx(logged["test/loss"] * (size - 1), rel=1e-6)
    bits = -nats / math.log(2) / (size - 1)
    assert bits == pytest.approx(logged["test/bits_per_byte"], rel=1e-6)


def test_several_texts_are_scored_by_themselves(words):
    lm = ArchzooLM(words, batch_size=3)
    texts = [TEXT[:500], TEXT[500:530], TEXT[530:2000]]
    together = lm.loglikelihood_rolling([asked("loglikelihood_rolling", t) for t in texts])
    for text, found in zip(texts, together, strict=True):
        (alone,) = ArchzooLM(words, batch_size=1).loglikelihood_rolling(
            [asked("loglikelihood_rolling", text)]
        )
        assert found == pytest.approx(alone, rel=1e-6)


# ---------------------------------------------------------------------------- continuations


def test_a_blank_at_the_end_of_a_context_belongs_to_the_continuation(words):
    lm = ArchzooLM(words)
    assert lm.pair("the good ", "king") == lm.pair("the good", " king")
    context, continuation = lm.pair("the good ", "king")
    assert words.tokenizer.decode([*context, *continuation]) == "the good king"


def test_a_continuation_in_two_parts_adds_up(characters):
    lm = ArchzooLM(model_of(characters))
    (whole, _), (first, _), (second, _) = likelihood(
        lm, ("To be", ", or not"), ("To be", ", or"), ("To be, or", " not")
    )
    assert whole == pytest.approx(first + second, rel=1e-6)


def test_a_longer_context_loses_its_beginning(characters):
    found = model_of(characters)
    lm = ArchzooLM(found)
    context, continuation = TEXT[:100], "good"
    long, short = likelihood(lm, (context, continuation), (context[-61:], continuation))
    assert long == short and lm.truncated == {"own": {0}}  # 61 and 3 are read
    wider = ArchzooLM(found, max_length=103)
    likelihood(wider, (context, continuation))
    assert not wider.truncated
    with pytest.raises(ValueError, match=r"task own: .* 65 tokens, .*: --max_length 65 reads"):
        likelihood(lm, ("a", TEXT[:65]))


def test_an_empty_context_begins_after_the_prefix(characters):
    found = model_of(characters)
    given, spelled, other = (
        likelihood(ArchzooLM(found, prefix=prefix), pair)[0]
        for prefix, pair in ((None, ("", "king")), ("", ("\n", "king")), ("a", ("", "king")))
    )
    # A line end at the end of a context would be scored with the continuation.
    lm = ArchzooLM(found)
    assert lm.pair("", "king") == (characters.encode("\n"), characters.encode("king"))
    assert given != other and spelled is not None
    with pytest.raises(ValueError, match=r"task own: 'king' has no context.* give --prefix"):
        likelihood(ArchzooLM(found, prefix=""), ("", "king"))
    with pytest.raises(ValueError, match="prefix='ab' is not one token"):
        ArchzooLM(found, prefix="ab")


def test_a_character_that_is_not_known_names_the_task(characters):
    with pytest.raises(ValueError, match="task own: character '漢'"):
        likelihood(ArchzooLM(model_of(characters)), ("a", "漢"))


# ---------------------------------------------------------------------------- written text


def test_texts_are_those_of_generate_whatever_the_batch_is(words):
    prompts = [TEXT[:20], TEXT[40:43], TEXT[100:130], "O", "The"]
    free = generate(words.model, prompts, max_tokens=20, tokenizer=words.tokenizer).texts
    until = [free[0][5:7], free[3][3:5]]
    wanted = [
        text[: min([p for s in until if (p := text.find(s)) >= 0], default=len(text))]
        for text in free
    ]
    assert wanted != free
    for batch_size in (1, 2, 16):
        lm = ArchzooLM(words, batch_size=batch_size)
        assert written(lm, prompts, until=until, max_gen_toks=20) == wanted
    assert written(lm, prompts, until=until[0], max_gen_toks=20)[0] == wanted[0]


def test_a_longer_prompt_loses_its_beginning(characters):
    found = model_of(characters)
    lm = ArchzooLM(found)
    long, short, cut = written(lm, [TEXT[:100], TEXT[45:100], "O"], until=[], max_gen_toks=10)
    assert long == short and len(long) == len(cut) == 10 and lm.truncated == {"own": {0}}
    # Three quarters are the prompt's, and what is left is written.
    assert len(written(lm, [TEXT[:100]], until=[], max_gen_toks=64)[0]) == 65 - 48
    assert len(written(lm, ["O"], until=[], max_gen_toks=64)[0]) == 64
    assert len(written(lm, ["O"], until=[])[0]) == 64  # 256 where a task does not say


def test_sampling_is_repeated_by_its_seed_and_greedy_draws_nothing(characters):
    lm = ArchzooLM(model_of(characters))
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(written(lm, ["O"], until=[], do_sample=True, temperature=1.5, top_p=0.9))
    assert texts[0] == texts[1] != texts[2]
    greedy = written(lm, ["O"], until=[])
    assert written(lm, ["O"], until=[], do_sample=False, temperature=2.0, top_k=3) == greedy
    with pytest.raises(ValueError, match="task own: num_beams is not a setting of generation"):
        written(lm, ["O"], until=[], num_beams=4)


def test_numbers_are_asked_and_answered_as_people_write_them(tmp_path):
    """A model that was trained on `71+52=24` is asked 17+25= and answers 42."""
    task = Addition(digits=2)
    problems = [(17, 25), (12, 31), (40, 28), (33, 45), (25, 49), (38, 13)]
    lines = [
        [*task.tokenizer.encode(task.prompt(a, b) + task.answer(a, b)), task.stop_token]
        for a, b in problems
    ]
    torch.manual_seed(0)
    net = archzoo.create_model("retnet_micro", vocab_size=task.vocab_size, context_length=8)
    net.task = task.config()
    tokens, optimizer = torch.tensor(lines), torch.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(120):  # it learns them by heart, on any processor
        logits = net(tokens[:, :-1]).logits[:, 5:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 6:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    lm = ArchzooLM(Pretrained(net.eval(), task.tokenizer, net.task), batch_size=4)
    prompts = [f"{a}+{b}=" for a, b in problems]
    right = [str(a + b) for a, b in problems]
    assert written(lm, prompts, until=["\n"], max_gen_toks=3) == right and not lm.truncated
    assert all(greedy for _, greedy in likelihood(lm, *zip(prompts, right, strict=True)))
    assert not any(
        greedy
        for _, greedy in likelihood(
            lm, *((p, r[::-1]) for p, r in zip(prompts, right, strict=True))
        )
    )


# ---------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, characters):
    """A model of characters that all shipped tasks can be asked of."""
    everything = TEXT + "0123456789+=" + (ROOT / "data" / "three_kingdoms.txt").read_text()
    tokenizer = CharacterTokenizer("".join(sorted(set(everything))))
    found = model_of(tokenizer, context_length=256)
    directory = tmp_path_factory.mktemp("eval") / "model"
    archzoo.save_pretrained(directory, found.model, tokenizer)
    return directory


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A directory without data/: the corpora are those beside archzoo."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(capsys, *arguments):
    capsys.readouterr()
    assert main(["eval", *map(str, arguments)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    return lines[0]


def test_git_is_not_asked_outside_a_repository(checkpoint, elsewhere, capfd):
    assert main(["eval", str(checkpoint), "--tasks", "addition", "--limit", "1"]) == 0
    assert "git" not in capfd.readouterr().err


def test_every_shipped_task_is_asked_offline(checkpoint, elsewhere, capsys):
    tasks = [name for name in SHIPPED if name != "three_kingdoms"]  # the same as shakespeare
    arguments = ["--limit", "3", "--directory", "out", "--log_samples"]
    assert main(["eval", str(checkpoint), "--tasks", ",".join(tasks), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "|shakespeare_next_line " in printed  # lm-eval's own table
    assert printed.rstrip().endswith("out holds eval.json, eval.csv, eval_samples.jsonl")
    with open("out/eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["task"] for row in rows} == set(tasks)
    records = json.loads(Path("out/eval.json").read_text())["results"]
    for row in rows:
        record = next(each for each in records if each["task"] == row["task"])
        figures = record["metrics"][row["metric"]]
        assert float(row["value"]) == figures["value"] and math.isfinite(figures["value"])
        assert row["documents"] == ("1" if row["task"] == "shakespeare" else "3")
        assert row["truncated"] == "0" and row["limit"] == "3" and row["max_length"] == "256"
        assert f" {row['task']} " in printed and row["weights"] == records[0]["weights"]
    samples = [json.loads(line) for line in Path("out/eval_samples.jsonl").read_text().splitlines()]
    assert {sample["task"] for sample in samples} == set(tasks)
    bits = next(row for row in rows if row["metric"] == "bits_per_byte")
    found = load(checkpoint)
    text = documents.held_out("shakespeare.txt")
    lm = ArchzooLM(found)
    (nats,) = lm.loglikelihood_rolling([asked("loglikelihood_rolling", text)])
    assert float(bits["value"]) == pytest.approx(-nats / math.log(2) / len(text.encode()), rel=1e-9)


def test_results_of_other_tasks_and_checkpoints_stay(checkpoint, elsewhere, capsys):
    for arguments in (["addition", "--limit", "2"], ["shakespeare_last_word", "--limit", "1"]):
        assert main(["eval", str(checkpoint), "--directory", "out", "--tasks", *arguments]) == 0
    assert (
        main(["eval", str(checkpoint), "--directory", "out", "--tasks", "addition", "--limit", "1"])
        == 0
    )
    records = json.loads(Path("out/eval.json").read_text())["results"]
    assert [(r["task"], r["documents"]) for r in records] == [
        ("shakespeare_last_word", 1), ("addition", 1),
    ]  # fmt: skip
    Path("out/eval.json").write_text("[]")
    message = error_of(
        capsys, checkpoint, "--directory", "out", "--tasks", "addition", "--limit", 1
    )
    assert "was not written by archzoo eval: move it away" in message


OWN = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_a_task_file_of_ones_own(checkpoint, elsewhere, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(elsewhere / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", elsewhere / "hub")
    Path("mine").mkdir()
    rows = [{"question": "Grass is", "choices": ["green", "loud"], "answer": n} for n in (0, 1, 0)]
    Path("mine/colours.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Path("mine/colours.yaml").write_text(OWN % (elsewhere / "mine" / "colours.jsonl"))
    arguments = ["--tasks", "colours", "--directory", ".", "--include_path", "mine"]
    assert main(["eval", str(checkpoint), *arguments]) == 0
    (record,) = json.loads(Path("eval.json").read_text())["results"]
    assert record["metrics"]["acc"]["value"] in (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_what_cannot_be_asked_is_one_line(checkpoint, elsewhere, capsys, monkeypatch):
    # Of lm-eval's own 14,000 tasks two, which are looked through in no time.
    Path("theirs").mkdir()
    Path("theirs/hellaswag.yaml").write_text(
        "task: hellaswag\ndataset_path: nobody/hellaswag\ntest_split: test\n"
        "doc_to_text: a\ndoc_to_target: b\n"
    )
    theirs = ["--include_path", "theirs"]
    message = error_of(capsys, checkpoint, *theirs, "--tasks", "hellaswag")
    assert "task hellaswag takes its data set from the Hugging Face hub, which cannot be" in message
    assert "lm-eval run --model dummy --tasks hellaswag --limit 1" in message
    assert "--tasks shakespeare" in message
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager",
        lambda include_path, include_defaults=True: TaskManager(
            include_path=include_path, include_defaults=False
        ),
    )
    for arguments, expected in (
        ([], "name a task: --tasks shakespeare; there are addition, shakespeare"),
        (["--tasks", "shakespere"], "no task 'shakespere'; nearest: shakespeare"),
        (["--tasks", "addition", "--limit", "0"], "limit=0 must be at least 1"),
        (["--tasks", "addition", "--fewshot", "-1"], "fewshot=-1 must be at least 0"),
        (["--tasks", "addition", "--batch_size", "0"], "batch_size=0 must be at least 1"),
        (["--tasks", "addition", "--max_length", "0"], "max_length=0 must be at least 1"),
        (["--tasks", "addition", "--include_path", "no"], "include_path='no' is not a directory"),
        (["--tasks", "addition", "--prefix", "ab"], "prefix='ab' is not one token"),
    ):
        assert expected in error_of(capsys, checkpoint, *arguments)
    assert "there is no checkpoint at nowhere" in error_of(capsys, "nowhere", "--tasks", "addition")
    archzoo.save_pretrained("mute", load(checkpoint).model)
    assert "holds no tokenizer" in error_of(capsys, "mute", "--tasks", "addition")
    knows = model_of(CharacterTokenizer("0123456789+=", special=True), context_length=12)
    archzoo.save_pretrained("sums", knows.model, knows.tokenizer)
    message = error_of(capsys, "sums", "--tasks", "shakespeare")
    assert "task shakespeare: character " in message and "is not one of the 12" in message
    with monkeypatch.context() as hidden:
        hidden.setattr("archzoo.shipped.root", lambda: elsewhere)
        message = error_of(capsys, checkpoint, "--tasks", "shakespeare")
    assert "task shakespeare: the corpus shakespeare.txt is neither in data/ here" in message


def test_an_adapter_is_put_on(checkpoint, elsewhere):
    found = load(checkpoint)
    adapted = archzoo.adapt(found.model, archzoo.LoRA(rank=2, targets=["mixer.query"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.fill_(0.5)
    archzoo.save_adapter("adapter", adapted)
    for arguments in ([], ["--adapter", "adapter"]):
        assert main([
            "eval", str(checkpoint), "--tasks", "shakespeare_last_word", "--limit", "2",
            "--directory", ".", *arguments,
        ]) == 0  # fmt: skip
    plain, adapted = json.loads(Path("eval.json").read_text())["results"]
    assert [plain["checkpoint"], adapted["checkpoint"]] == ["model", "model + adapter"]
    assert plain["weights"] != adapted["weights"]
    assert plain["metrics"]["perplexity"]["value"] != adapted["metrics"]["perplexity"]["value"]


# ---------------------------------------------------------------------------- lm-eval's own command


def test_lm_eval_finds_the_model_by_its_entry_point(checkpoint):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["entry-points"]["lm_eval.models"]["archzoo"]
    assert named == f"{ArchzooLM.__module__}:{ArchzooLM.__qualname__}"
    assert get_model("archzoo") is ArchzooLM
    results = lm_eval.simple_evaluate(
        model="archzoo",
        model_args=f"checkpoint={checkpoint},max_length=128",
        tasks=["addition"],
        task_manager=lm_eval.tasks.TaskManager(
            include_path=command.SHIPPED, include_defaults=False
        ),
        batch_size="4",
        device="cpu",
        limit=2,
    )
    assert 0 <= results["results"]["addition"]["exact_match,none"] <= 1
    assert results["config"]["max_length"] == 128


# ---------------------------------------------------------------------------- docs/evaluation.md


def test_every_command_of_the_page_runs_in_order(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    for name in ("configs", "data"):
        Path(name).symlink_to(ROOT / name)
    blocks = re.findall(r"```(bash|yaml|json|python)\n(.*?)```", page, re.S)
    Path("mine").mkdir()
    for kind, name in (("yaml", "verses.yaml"), ("json", "verses.jsonl")):
        (content,) = (content for found, content in blocks if found == kind)
        Path("mine", name).write_text(content)
    ran = 0
    for line in "".join(content for kind, content in blocks if kind == "bash").splitlines():
        program, *arguments = shlex.split(line)
        if program == "pip":
            continue
        assert program == "archzoo"
        # In few steps, of a small model, and of the tasks a few documents.
        arguments = [re.sub(r"^(300|100)$", "2", argument) for argument in arguments]
        if arguments[0] == "fit":
            small = ["--model.preset", "retnet_micro", "--trainer.max_steps", "2"]
            arguments += [*small, "--trainer.val_check_interval", "2"]
            arguments += ["--trainer.limit_val_batches", "1"]
        if arguments[0] == "eval" and "--limit" not in arguments:
            arguments += ["--limit", "2"]
        assert main(arguments) == 0, line
        ran += 1
    assert ran == 6
    capsys.readouterr()
    (code,) = (content for kind, content in blocks if kind == "python")
    exec(code, {})
    assert 4 < float(capsys.readouterr().out.splitlines()[-1]) < 8
    for name in SHIPPED:
        assert f"| `{name}` |" in page
