"""A model is prompted with numbers as people write them, whatever its task does with them."""

import warnings
from pathlib import Path

import pytest
import torch

import archzoo
from archzoo.checkpoint import load
from archzoo.conversion.upcycle import upcycle
from archzoo.generation import generate_command
from archzoo.tasks import (
    Addition,
    Arithmetic,
    BitwiseOr,
    Mixed,
    Multiplication,
    Sorting,
    Subtraction,
)
from archzoo.tasks.writing import Writing, writing_of
from archzoo.training.module import LanguageModel

ORDERS = [
    {"reverse": reverse, "reverse_answer": answer}
    for reverse in (True, False)
    for answer in (None, True, False)
]
OPERATIONS = [(Addition, int.__add__), (Subtraction, int.__sub__), (Multiplication, int.__mul__)]


@pytest.mark.parametrize("orders", ORDERS)
@pytest.mark.parametrize("hints", [False, True])
@pytest.mark.parametrize("zero_padded", [False, True])
@pytest.mark.parametrize(("kind", "operation"), OPERATIONS)
def test_prompts_and_answers_are_the_tasks(kind, operation, orders, hints, zero_padded):
    task = kind(digits=4, hints=hints, zero_padded=zero_padded, **orders)
    writing, sign = writing_of(task.config()), task.operators[0]
    for a, b in [(17, 25), (5, 9876), (1234, 56), (10, 10), (8, 7)]:
        prompt = task.prompt(a, b)
        assert writing.write(f"{a}{sign}{b}=") == prompt
        assert writing.write(prompt) == prompt or not hints  # typed as the task writes it
        segments = [*task.answer(a, b)]  # as they come from a model, token by token
        reader = writing.reader(prompt)
        answer = "".join(map(reader.push, segments)) + reader.finish()
        assert int(answer) == operation(a, b)
        assert answer == writing.read(task.answer(a, b), prompt)
        whole = writing.read(prompt + task.answer(a, b))
        assert whole.endswith("=" + answer)


def test_vectors_and_lists():
    either = writing_of(BitwiseOr(digits=4).config())
    assert either.write("0001|000=") == "1000|000="
    assert either.read("1000", "1000|000=") == "0001"
    lists = writing_of(Sorting(hints=True).config())
    assert lists.write("C:12,D:7=") == "C:C2D1,D:C7="
    assert lists.read("D,C", "C:C2D1,D:C7=") == "D,C"
    assert writing_of(Sorting().config()).write("A:52,B:7=") == "A:25,B:7="
    several = writing_of(Arithmetic({"Addition": {}, "Subtraction": {}}).config())
    assert several.write("4-13=") == "4-31=" and several.read("-9", "4-31=") == "-9"


def test_a_text_keeps_its_numbers_and_its_problems_do_not(tmp_path):
    (tmp_path / "text.txt").write_text("In 1596 he was 32.\n" * 200)
    task = Mixed(path=str(tmp_path / "text.txt"), context_length=64, cache_dir=str(tmp_path))
    writing = writing_of(task.config())
    assert writing.write("In 1596 he wrote\n17+25=") == "In 1596 he wrote\n71+52="
    assert writing.read("24\nIn 1596 71+52=24\n", "71+52=") == "42\nIn 1596 17+25=42\n"
    reader, text = writing.reader("In 15"), "96 he said 71+52=24\nand 12"
    assert "".join(map(reader.push, text)) + reader.finish() == "96 he said 17+25=42\nand 12"


@pytest.mark.parametrize("task", [None, {}, {"class_path": "a.B", "init_args": None}])
def test_what_says_nothing_is_written_as_people_do(task):
    assert writing_of(task) == Writing()
    assert writing_of(task).write("17+25=") == "17+25="
    assert writing_of(task).read("42") == "42"


SUMS = {"7+5=": "12", "9+4=": "13", "8+8=": "16"}  # that carry: right one way round alone


@pytest.fixture(scope="module")
def adder():
    """A model that knows some sums by heart, and the trainer of its run."""
    import lightning

    torch.manual_seed(0)
    task = Addition(digits=1, batch_size=4, held_out=2)
    module = LanguageModel("transformer_micro")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, enable_checkpointing=False, limit_val_batches=0, **quiet
    )
    trainer.fit(module, task)
    pairs = [map(int, prompt[:-1].split("+")) for prompt in SUMS]
    lines = [task.prompt(a, b) + task.answer(a, b) for a, b in map(tuple, pairs)]
    tokens = torch.tensor([[*task.tokenizer.encode(line), task.stop_token] for line in lines])
    optimizer = torch.optim.Adam(module.net.parameters(), lr=1e-2)
    for _ in range(150):
        logits = module.net(tokens[:, :-1]).logits[:, 3:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 4:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    return module, trainer


def test_every_way_of_asking_gives_the_sum(adder, tmp_path, capsys):
    """With a carry: what is read the wrong way round cannot be right."""
    module, trainer = adder
    run, directory = tmp_path / "run.ckpt", tmp_path / "model"
    trainer.save_checkpoint(run)

    def ask(net, tokenizer, prompts):
        texts = archzoo.generate(net, prompts, tokenizer=tokenizer, max_tokens=8).texts
        heard = []
        for prompt in prompts:
            archzoo.generate(
                net, prompt, tokenizer=tokenizer, max_tokens=8, on_token=lambda *c: heard.append(c)
            )
        assert "".join(text for _, _, text in heard) == "".join(texts)
        return texts

    prompts, answers = list(SUMS), list(SUMS.values())
    tokenizer = module.task.tokenizer
    assert ask(module.net, tokenizer, prompts) == answers, "the model that was just trained"
    net, tokenizer = archzoo.from_pretrained(run)
    assert ask(net, tokenizer, prompts) == answers
    archzoo.save_pretrained(directory, net, tokenizer)
    assert load(directory).task == module.task.config()
    assert ask(*archzoo.from_pretrained(directory), prompts) == answers
    sparse = upcycle(net, experts=2)
    archzoo.save_pretrained(tmp_path / "sparse", sparse, tokenizer)
    assert ask(*archzoo.from_pretrained(tmp_path / "sparse"), prompts) == answers
    again = LanguageModel.load_from_checkpoint(run, map_location="cpu", weights_only=True)
    assert ask(again.net, tokenizer, prompts) == answers
    for path in (run, directory):
        generate_command(str(path), prompts, max_tokens=8, device="cpu")
        lines = capsys.readouterr().out.splitlines()
        assert lines[:3] == [prompt + answer for prompt, answer in SUMS.items()]
        generate_command(str(path), prompts[:1], max_tokens=8, device="cpu")
        assert capsys.readouterr().out.startswith("7+5=12\n")
    stop = tokenizer.stop_token  # tokens are the task's own
    raw = archzoo.generate(net, tokenizer.encode("7+5="), stop_token=stop, max_tokens=8).tokens
    assert tokenizer.decode(raw[0]) == "21"


def test_a_prompt_that_is_not_utf8(tmp_path: Path) -> None:
    net = archzoo.create_model("retnet_micro", vocab_size=Addition().vocab_size)
    tokenizer = Addition().tokenizer
    with pytest.raises(ValueError, match=r"prompt 1 is not valid UTF-8, byte 0xff at position 2"):
        archzoo.generate(net, ["1+1=", "1+\udcff"], tokenizer=tokenizer, max_tokens=1)
    archzoo.save_pretrained(tmp_path / "m", net, tokenizer)
    with pytest.raises(ValueError, match="stop is not valid UTF-8"):
        generate_command(str(tmp_path / "m"), ["1"], stop="\udcff")


def test_a_character_that_the_task_never_wrote_is_refused():
    """With the shared vocabulary it has a token, about which the model knows nothing."""
    for task, known, unknown in (
        (Addition(), "12+3=", "12-3="),
        (Addition(reverse=False), "12+3=", "12 +3="),
        (Addition(hints=True), "A1B2+A3=", "1x3="),
        (Addition(vocabulary="own"), "12+3=", "12-3="),
        (Sorting(), "A:1,B:2=", "A:1;B:2="),
        (Arithmetic({"Addition": {}, "Subtraction": {}}), "1-2=", "1x2="),
    ):
        writing = writing_of(task.config())
        writing.write(known)
        with pytest.raises(ValueError, match="is not one of those that the model was trained on"):
            writing.write(unknown)
    writing_of(Mixed().config()).write("any text at all")
    model = archzoo.create_model("retnet_micro", vocab_size=96)
    model.task = Addition().config()
    tokenizer = Addition().tokenizer
    with pytest.raises(ValueError, match="character '-' in '12-3=' is not one of"):
        archzoo.generate(model, "12-3=", tokenizer=tokenizer, max_tokens=1)


def test_a_model_that_does_not_know_its_task_says_so():
    net, task = archzoo.create_model("retnet_micro", vocab_size=Addition().vocab_size), Addition()
    with pytest.warns(UserWarning, match=r"set model\.task = task\.config\(\)"):
        archzoo.generate(net, "1+1=", tokenizer=task.tokenizer, max_tokens=1)
    net.task = task.config()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        archzoo.generate(net, "1+1=", tokenizer=task.tokenizer, max_tokens=1)
