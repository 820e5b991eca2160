"""The verb lint: what it finds in a corpus of scripts, and that mended scripts train an adapter.

A line of the corpus that ends in `# finds L1 fixable` must be found, as that, and no other line may be.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from speechtune import lint as lint_module
from speechtune import lint_fixes
from speechtune.errors import ConfigError
from speechtune.lint import Finding, fix, lint, lint_paths, run_lint

CORPUS = Path(__file__).with_name("lint_corpus")
ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(CORPUS.glob("*.py"))
TRAINABLE = sorted(script.stem for script in SCRIPTS if "LlamaForCausalLM(CONFIG)" in script.read_text("utf-8"))

# Imports once, then runs each script in a process of its own: `script folder` pairs in, exit codes out.
RUNNER = """
import json, os, runpy, sys, traceback
import accelerate, peft, torch, transformers
codes = []
for script, folder in json.loads(sys.argv[1]):
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.chdir(folder)
            os.dup2(os.open("log.txt", os.O_CREAT | os.O_WRONLY), 1)
            os.dup2(1, 2)
            runpy.run_path(script, run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes.append(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


def script(folder: Path, text: str, name: str = "train.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def shown(findings: list[Finding]) -> dict[int, str]:
    return {
        found.line: found.code + " fixable" * found.fixable + " note" * (found.severity == "note") for found in findings
    }


def codes(folder: Path, text: str) -> list[str]:
    return [found.code for found in lint(script(folder, text))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_corpus(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    marked = {number: line.partition("# finds ")[2] for number, line in enumerate(lines, 1) if "# finds " in line}
    assert shown(lint(path)) == marked
    assert bool(marked) is not path.stem.startswith("sound_")


def test_corpus_is_varied() -> None:
    found = {finding.code for finding in lint_paths([CORPUS])}
    assert found == {"L1", "L2", "L3", "L4", "L5", "L6", "L7"}
    assert sum(path.stem.startswith("sound_") for path in SCRIPTS) >= 7 and len(TRAINABLE) >= 7


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], tuple[int, Path]]:
    """Exit code and folder of each trainable script, as it is (False) and mended (True)."""
    jobs = {}
    for name in TRAINABLE:
        for mended in (False, True):
            folder = tmp_path_factory.mktemp(name)
            path = script(folder, (CORPUS / f"{name}.py").read_text("utf-8"))
            if mended:
                fix(path)
            jobs[name, mended] = (str(path), str(folder))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUNNER, json.dumps(list(jobs.values()))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return {key: (code, Path(job[1])) for (key, job), code in zip(jobs.items(), results, strict=True)}


def trained_adapter(folder: Path) -> bool:
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file) if file.exists() else {}
    return any("lora_B" in name and bool(tensor.any()) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", TRAINABLE)
def test_mended_script_trains_an_adapter(name: str, runs: dict[tuple[str, bool], tuple[int, Path]]) -> None:
    code, folder = runs[name, True]
    assert code == 0, (folder / "log.txt").read_text()
    assert trained_adapter(folder)
    _, unmended = runs[name, False]
    assert not trained_adapter(unmended), "the corpus script is not faulty"


def cases(text: str) -> dict[str, str]:
    """Scripts by name, each after a line `## name`."""
    parts = [part.partition("\n") for part in text.split("## ")[1:]]
    return {name: code for name, _, code in parts}


IMPORTS = """
import copy
import torch
from torch import nn
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, Trainer, TrainingArguments
"""

FAULTY = cases("""
## L1 under another name
import peft.tuners.lora as pl
def f(data):
    c = pl.LoraConfig()
    print(f'{c}', c.r)
## L1 in an expression of its own
LoraConfig(r=8)
Trainer(model=AutoModel.from_pretrained('x')).train()
## L1 only compared
def f():
    c = LoraConfig()
    d = c
    if d is None or not c:
        return 1
## L2 of a copy's original
m = AutoModel.from_pretrained('x')
s = copy.deepcopy(m)
Trainer(model=s)
m.save_pretrained('o')
## L2 wrapped inside the call
def f(m, a):
    t = Trainer(model=get_peft_model(m, a))
    m.save_pretrained('o')
## L2 under an older name
def f(m, a):
    b = m
    m = get_peft_model(m, a)
    Trainer(model=m)
    b.save_pretrained('o')
## L2 of a wrapper
class W(nn.Module):
    pass
class V(W):
    pass
w = V()
w.save_pretrained('o')
## L3 after to()
def f(m, a):
    m = get_peft_model(m, a)
    m.to('cuda')
    m.to(dtype=torch.half)
    Trainer(model=m)
## L3 with half load_adapter
def f(m):
    m.half()
    m.load_adapter('a', is_trainable=True)
    Trainer(model=m, args=TrainingArguments('o', fp16=False))
## L4 through a base class
class A(Trainer):
    pass
class B(A):
    def training_step(self, model, inputs):
        return model(inputs)
## L5 by keyword
def f(m, b):
    return m(input_ids=b['input_ids'], attention_mask=b['attention_mask'], labels=b['input_ids'])
## L5 by list
def f(t, x):
    r = t(x, padding=True)
    r['labels'] = list(r['input_ids'])
    return r
## L5 with -100 in a comparison only
def f(r, labels):
    r['labels'] = r['input_ids'].copy()
    return r, [label for label in labels if label != -100]
## L7 bare
def f(m):
    try:
        m.save_pretrained('o')
    except:
        pass
## L7 around the trainer
t = Trainer(model=m)
try:
    t.train()
except Exception:
    ...
""")


@pytest.mark.parametrize("name", FAULTY)
def test_faults(name: str, tmp_path: Path) -> None:
    assert codes(tmp_path, IMPORTS + FAULTY[name]) == [name[:2]]


SOUND = cases("""
## L1 configuration for another file
config = LoraConfig(r=8)
pass  # else: Trainer(model=m)
## L1 configuration read by locals
def f(m):
    c = LoraConfig()
    return locals()  # else: return m
## L1 configuration in a class
class C:  # else: if m:
    lora = LoraConfig()
Trainer(model=m)
## L1 configuration used by a closure
def f(m):
    c = LoraConfig()
    def g():
        return get_peft_model(m, c)  # else: return m
    return g
## L1 configuration yielded
def f():
    c = LoraConfig()
    yield c  # else: yield c.r
## L1 configuration chosen
def f(m, x):
    c = LoraConfig()
    d = x or c
    return get_peft_model(m, d)  # else: return m
## L1 configuration of another package
from vllm import LoraConfig as Config  # else: from peft import LoraConfig as Config
c = Config()
Trainer(model=m)
## L1 expected to fail
def test():
    with pytest.raises(ValueError):  # else: with m:
        LoraConfig(r=-1)
    Trainer(model=m)
## L1 tried
def knows_targets(m):
    try:  # else: with m:
        LoraConfig(target_parameters=['x'])
        return True
    except TypeError:  # else: if m:
        return False
Trainer(model=m)
## L2 base saved before
def f(m, a):
    m.save_pretrained('b')
    p = get_peft_model(m, a)
    Trainer(model=p)
    pass  # else: m.save_pretrained('b')
## L2 both trained
def f(m, a):
    p = get_peft_model(m, a)
    Trainer(model=p)
    Trainer(model=m)  # else: pass
    m.save_pretrained('o')
## L2 base made anew
def f(m, a):
    p = get_peft_model(m, a)
    Trainer(model=p)
    m = g()  # else: pass
    m.save_pretrained('o')
## L2 wrapped in a branch
def f(m, a):
    p = m
    if a:  # else: with a:
        p = get_peft_model(m, a)
    Trainer(model=p)
    m.save_pretrained('o')
## L2 wrapped by another method, perhaps
class T:
    def f(self, a):
        self.p = get_peft_model(self.m, a)
        Trainer(model=self.p)
        self.m.save_pretrained('o')
    def g(self):
        self.p = h()  # else: pass
## L2 older name of another model
def f(m, a):
    b = m
    m = g()  # else: pass
    p = get_peft_model(m, a)
    Trainer(model=p)
    b.save_pretrained('o')
## L2 merged in place
def f(m, a):
    p = get_peft_model(m, a)
    Trainer(model=p)
    p.merge_and_unload()  # else: pass
    m.save_pretrained('o')
## L2 state dict given
def f(m, a):
    p = get_peft_model(m, a)
    Trainer(model=p)
    m.save_pretrained('o', state_dict=g(p))  # else: m.save_pretrained('o')
## L2 perhaps without peft_config
def f(m, a):
    c = LoraConfig() if a else None  # else: c = LoraConfig()
    Trainer(model=m, peft_config=c)
    m.save_pretrained('o')
## L2 copy and original saved
def f(m):
    s = copy.deepcopy(m)
    Trainer(model=s)
    m.save_pretrained('teacher')
    s.save_pretrained('o')  # else: pass
## L2 wrapper asked first
class W(nn.Module):
    pass
t = Trainer(model=W())
if hasattr(t.model, 'save_pretrained'):  # else: if t:
    t.model.save_pretrained('o')
## L2 wrapper tried
class W(nn.Module):
    pass
t = Trainer(model=W())
try:  # else: if t:
    t.model.save_pretrained('o')
except AttributeError:  # else: if t:
    torch.save(t.model.state_dict(), 'o')
## L2 wrapper that delegates
class W(nn.Module):
    def __getattr__(self, n):  # else: def other(self, n):
        return 1
w = W()
w.save_pretrained('o')
## L2 wrapper with a mixin
class W(nn.Module, Mixin):  # else: class W(nn.Module):
    pass
w = W()
w.save_pretrained('o')
## L2 reloaded with the adapter
m = AutoModel.from_pretrained('x')
Trainer(model=m)
m = AutoModel.from_pretrained('x')
m.load_adapter('o')  # else: pass
m.save_pretrained('p')
## L2 base saved beside the adapter
m = AutoModel.from_pretrained('x')
t = Trainer(model=m)
t.save_model('o')  # else: pass
m = AutoModel.from_pretrained('x')
m.save_pretrained('base')
## L3 DeepSpeed
def f(m, a):
    m = get_peft_model(m, a).half()
    Trainer(model=m, args=TrainingArguments('o', deepspeed='z.json'))  # else: Trainer(model=m)
## L3 unknown arguments
def f(m, a, args):
    m = get_peft_model(m, a).half()
    Trainer(model=m, args=args)  # else: Trainer(model=m, args=TrainingArguments(args.o))
## L3 adafactor
def f(m, a):
    m = get_peft_model(m, a).half()
    Trainer(m, TrainingArguments(optim='adafactor'))  # else: Trainer(m, TrainingArguments(optim='adamw_torch'))
## L3 SGD
def f(m, a):
    m = get_peft_model(m, a).half()
    torch.optim.SGD(m.parameters())  # else: torch.optim.AdamW(m.parameters())
    m(1).backward()
## L3 another eps
def f(m, a):
    m = get_peft_model(m, a).half()
    torch.optim.AdamW(m.parameters(), eps=1e-4)  # else: torch.optim.AdamW(m.parameters(), lr=1e-4)
    m(1).backward()
## L3 GradScaler
def f(m, a):
    m = get_peft_model(m, a).half()
    torch.optim.AdamW(m.parameters())
    s = torch.amp.GradScaler()  # else: s = m
    s.scale(m(1)).backward()
## L3 scaler of accelerate
def f(m, a):
    x = Accelerator(mixed_precision='fp16')  # else: x = Accelerator(mixed_precision='no')
    m = get_peft_model(m, a).half()
    torch.optim.AdamW(m.parameters())
    x.backward(m(1))
## L3 back in fp32
def f(m, a):
    m = get_peft_model(m, a).half()
    m.float()  # else: m.cuda()
    Trainer(model=m)
## L3 cast parameter by parameter
def f(m, a):
    m = get_peft_model(m, a).half()
    for p in m.parameters():
        p.data = p.data.float()  # else: print(p.shape)
    Trainer(model=m)
## L3 half in a branch
def f(m, a):
    m = get_peft_model(m, a)
    if a:  # else: with a:
        m.half()
    Trainer(model=m)
## L3 adapter in fp32
def f(a):
    m = AutoModel.from_pretrained('x', torch_dtype=torch.float16)
    m = get_peft_model(m, a)  # else: m.add_adapter(a)
    Trainer(model=m)
## L3 base in bf16
def f(a):
    m = AutoModel.from_config(a, dtype=torch.bfloat16)  # else: m = AutoModel.from_config(a, dtype='float16')
    m.add_adapter(a)
    Trainer(model=m)
## L3 quantized
def f(q, a):
    q = dict(quantization_config=q)
    m = AutoModel.from_config(a, dtype=torch.half, **q)  # else: m = AutoModel.from_config(a, dtype=torch.half)
    m.add_adapter(a)
    Trainer(model=m)
## L3 half for inference only
def f(m, a):
    m = get_peft_model(m, a)
    m.half()
    pass  # else: Trainer(model=m)
## L4 unknown base
from mine import Base  # else: from transformers import Trainer as Base
class A(Base):
    def training_step(self, m, x):
        return m(x)
## L4 by a method not seen
class A(Mixin, Trainer):
    def training_step(self, m, x):
        loss = m(x)
        self.step_amp(loss)  # else: self.log(loss)
        return loss
## L4 by a function of another file
class A(Trainer):
    def training_step(self, m, x):
        loss = m(x)
        propagate(loss)  # else: float(loss)
        return loss
## L4 not written yet
class A(Trainer):
    def training_step(self, m, x):
        raise NotImplementedError  # else: return m(x)
## L5 changed by a function
def f(t, x):
    input_ids = t(x, padding=True)
    labels = input_ids.clone()
    cut(labels)  # else: labels = labels.to('cuda')
    return labels
## L5 never read
def f(input_ids):
    labels = input_ids.clone()
    return input_ids  # else: return labels
## L5 ids of another text
def f(t, x, y):
    r, s = t(x, padding=True), t(y)
    r['labels'] = s['input_ids']  # else: r['labels'] = r['input_ids']
    return r
## L5 masked in a collator
def f(r):
    r['labels'] = r['input_ids'].copy()
    return r
def collate(rows):
    return g(rows, -100)  # else: return g(rows, 0)
## L5 ignored by the loss
def f(input_ids, pad):
    labels = input_ids.clone()
    return nn.CrossEntropyLoss(ignore_index=pad)(g(input_ids), labels)  # else: return nn.CrossEntropyLoss()(1, labels)
## L5 padded by a collator that masks
def f(t, x):
    r = t(x, truncation=True)  # else: r = t(x, padding='max_length')
    r['labels'] = r['input_ids'].copy()
    return r
collator = DataCollatorForSeq2Seq(t)
## L5 in blocks
def f(r, n):
    r = {k: [v[i : i + n] for i in range(0, len(v), n)] for k, v in r.items()}  # else: r = dict(r)
    r['labels'] = r['input_ids'].copy()
    return r
## L5 for an evaluation
def f(m, b):
    with torch.no_grad():  # else: with m:
        return m(**b, labels=b['input_ids'])
## L6 not in fp16
args = TrainingArguments('o', bf16=True)  # else: args = TrainingArguments('o', fp16=True)
## L6 shown
args = TrainingArguments('o', fp16=True, logging_nan_inf_filter=False)  # else: args = TrainingArguments('o', fp16=True)
## L7 the run ends
try:
    m.save_pretrained('o')
except Exception:
    sys.exit(1)  # else: pass
## L7 one kind of error
try:
    m.save_pretrained('o')
except ConnectionError:  # else: except (ConnectionError, Exception):
    pass
## L7 the tokenizer
try:
    tokenizer.save_pretrained('o')  # else: m.save_pretrained('o')
except Exception:
    pass
## L7 handled
try:
    loss.backward()
except Exception:
    repair(m)  # else: print(m)
## L7 raised where it matters
def compute_loss(m, strict):
    try:
        return m()
    except Exception:
        if strict:
            raise  # else: print(m)
        return torch.tensor(0.0)
## L7 a loss of zero in an evaluation
def evaluate(m):  # else: def compute_loss(m):
    try:
        return m()
    except Exception:
        return torch.tensor(0.0)
""")


@pytest.mark.parametrize("name", SOUND)
def test_no_false_alarm(name: str, tmp_path: Path) -> None:
    """With the line's `# else:` in its place, the fault is there, and is found."""
    lines = [line.partition("  # else: ") for line in SOUND[name].splitlines()]
    indents = [line[: len(line) - len(line.lstrip())] for line, _, _ in lines]
    twin = [indent + other if mark else line for (line, mark, other), indent in zip(lines, indents, strict=True)]
    assert codes(tmp_path, IMPORTS + "\n".join(line for line, _, _ in lines)) == []
    assert codes(tmp_path, IMPORTS + "\n".join(twin)) == [name[:2]]


STAYS = cases("""
## several models
c = LoraConfig()
m, n = g(), g()
a = g()
b = g()
Trainer(model=a)
Trainer(model=b)
## a W of this script
class W(nn.Module):
    pass
c = LoraConfig()
m = W()
Trainer(model=m)
## several LoraConfigs
c = LoraConfig()
d = LoraConfig()
m = g()
Trainer(model=m)
## a PEFT model already
def f(m, a):
    c = LoraConfig()
    m = get_peft_model(m, a)
    Trainer(model=m)
## an adapter already
def f(m, a):
    c = LoraConfig()
    m.add_adapter(a)
    Trainer(model=m)
## after the optimizer
m = g()
Trainer(model=m)
c = LoraConfig()
## a variable of its own
LoraConfig()
m = g()
Trainer(model=m)
## from a variable
c = LoraConfig()
Trainer(model=g())
## by name
c = LoraConfig()
m = 'gpt2'
Trainer(model=m)
## at each turn
m = g()
for r in (1, 2):
    c = LoraConfig(r=r)
    Trainer(model=m)
## may not be taken
if g():
    c = LoraConfig()
m = g()
Trainer(model=m)
## shares its line
m = g()
if m: c = LoraConfig()
Trainer(model=m)
## is an argument
c = LoraConfig()
def f(m):
    Trainer(model=m)
## a configuration by itself
c = LoraConfig()
m = g()
Trainer(model=m, **g())
## a bare layer
c = LoraConfig()
m = nn.Linear(2, 2)
torch.optim.AdamW(m.parameters())
## something else
def get_peft_model(m, c):
    pass
c = LoraConfig()
m = g()
Trainer(model=m)
## wrapper holds is not certain
class W(nn.Module):
    pass
w = W()
w.save_pretrained('o')
## not in reach
def f(m, a):
    Trainer(model=get_peft_model(m, a)).train()
    m.save_pretrained('o')
""")


@pytest.mark.parametrize("reason", STAYS)
def test_what_is_not_certain_is_left_with_its_reason(reason: str, tmp_path: Path) -> None:
    imports = IMPORTS.replace(", get_peft_model", "") if reason == "something else" else IMPORTS
    path = script(tmp_path, imports + STAYS[reason])
    report = fix(path)
    assert report.fixed == [] and report.backup is None and report.diff == ""
    assert any(f"leaves this to you: {reason}" in f.message or reason in f.message for f in report.left), report.left
    assert not any(found.fixable for found in report.left)
    assert [file.name for file in tmp_path.iterdir()] == ["train.py"] and path.read_text() == imports + STAYS[reason]


MARKS = (("< ", "> "), ("> ", "< "))
MENDED = cases("""
## by an alias
from peft import LoraConfig as LC, get_peft_model as gpm
m = g()
c = LC()
> m = gpm(m, c)
Trainer(model=m)
## by a star
from peft import *
m = g()
c: object = LoraConfig()
> m = get_peft_model(m, c)
Trainer(model=m)
## after both branches
import peft
c = peft.LoraConfig()
if g():
    m = g()
else:
    m = h()
> m = peft.get_peft_model(m, c)
opt = AdamW(m.parameters())
## in the function of the model
import peft
c = peft.LoraConfig()
def f(data):
    self.m = g()
>     self.m = peft.get_peft_model(self.m, c)
    t = Trainer(model=self.m)

## import inside a function
def f(m):
    from peft import LoraConfig
>     from peft import get_peft_model
    c = LoraConfig()
>     m = get_peft_model(m, c)
    Trainer(model=m)
## by the trainer's model
import peft
t = Trainer(model=peft.get_peft_model(m, a))
t.train()
< m.save_pretrained('o', safe_serialization=False)
> t.model.save_pretrained('o', safe_serialization=False)
## by accelerate
import peft
def f(accelerator, m, a):
    p = peft.get_peft_model(m, a)
    opt = AdamW(p.parameters())
    p, opt = accelerator.prepare(p, opt)
<     m.save_pretrained('o', safe_serialization=False)
>     accelerator.unwrap_model(p).save_pretrained('o', safe_serialization=False)
## by the wrapper's variable
import torch
import peft
class W(torch.nn.Module):
    pass
p = peft.get_peft_model(m, a)
w = W(p)
< (w.save_pretrained('o'))
> (p.save_pretrained('o'))
""")


@pytest.mark.parametrize("name", MENDED)
def test_mends(name: str, tmp_path: Path) -> None:
    lines = MENDED[name].splitlines(keepends=True)  # "<" marks a line that goes, ">" one that comes
    before, after = ("".join(line.removeprefix(mark) for line in lines if line[:2] != other) for mark, other in MARKS)
    path = script(tmp_path, before)
    assert len(fix(path).fixed) == 1
    assert path.read_text() == after


@pytest.mark.parametrize("kind", ["crlf", "bom", "latin-1", "tabs", "no newline at the end"])
def test_a_mend_changes_nothing_else(kind: str, tmp_path: Path) -> None:
    text = (CORPUS / "faulty_saves_base.py").read_text("utf-8").replace("# finds L2 fixable", "#  as  it   was ;")
    original = {
        "crlf": text.replace("\n", "\r\n").encode(),
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "latin-1": ("# -*- coding: latin-1 -*-\n" + text.replace("prompt", "prömpt")).encode("latin-1"),
        "tabs": text.replace("    ", "\t").encode(),
        "no newline at the end": text.rstrip().encode(),
    }[kind]
    path = tmp_path / "train.py"
    path.write_bytes(original)
    report = fix(path)
    assert path.read_bytes() == original.replace(b"base_model.save_pretrained", b"model.save_pretrained")
    changed = [line for line in report.diff.splitlines()[2:] if line.startswith(("+", "-"))]
    assert len(changed) == 2 and report.left == []


def test_inserted_lines_end_as_the_others_do(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_bytes((CORPUS / "faulty_config_unused.py").read_bytes().replace(b"\n", b"\r\n"))
    assert fix(path).fixed
    assert path.read_bytes().count(b"\n") == path.read_bytes().count(b"\r\n")


def test_backups_are_kept_and_modes_too(tmp_path: Path) -> None:
    text = (CORPUS / "faulty_config_unused.py").read_text("utf-8")
    path = script(tmp_path, text)
    path.chmod(0o750)
    link = tmp_path / "link.py"
    link.symlink_to(path)
    assert fix(link).backup == str(tmp_path / "train.py.bak") and link.is_symlink()
    path.write_text(text, encoding="utf-8")
    assert fix(path).backup == str(tmp_path / "train.py.bak1")
    backups = [tmp_path / "train.py.bak", tmp_path / "train.py.bak1"]
    assert all(backup.read_text("utf-8") == text for backup in backups)
    assert {file.stat().st_mode & 0o777 for file in (path, *backups)} == {0o750}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.py", "train.py", "train.py.bak", "train.py.bak1"]
    changed = [
        line for line in difflib.ndiff(text.splitlines(), path.read_text("utf-8").splitlines()) if line[0] in "+-"
    ]
    assert changed == ["+ from peft import get_peft_model", "+ model = get_peft_model(model, lora_config)"]


def test_a_full_disk_leaves_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (CORPUS / "faulty_config_unused.py").read_text("utf-8")
    path = script(tmp_path, text)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        fix(path)
    assert path.read_text("utf-8") == text and [file.name for file in tmp_path.iterdir()] == ["train.py"]


def test_without_a_backup_nothing_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (CORPUS / "faulty_config_unused.py").read_text("utf-8")
    path = script(tmp_path, text)

    def refuse(path: Path, original: bytes) -> Path:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(lint_fixes, "_backup", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        fix(path)
    assert path.read_text("utf-8") == text and [file.name for file in tmp_path.iterdir()] == ["train.py"]


def test_a_script_that_changes_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(tmp_path, (CORPUS / "faulty_config_unused.py").read_text("utf-8"))
    check = lint_module._check

    def slow(*arguments):
        path.write_text("# edited\n")
        return check(*arguments)

    monkeypatch.setattr(lint_module, "_check", slow)
    with pytest.raises(ConfigError, match="changed while"):
        fix(path)
    assert path.read_text() == "# edited\n"


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (b"x = 1\nif x:\ny = 2\n", 3),
        (b"import os\nprint 'two'\n", 2),
        (b"x = 1\x00\n", 1),
        (b"# -*- coding: utf-8 -*-\nname = '\xff'\n", 2),
    ],
)
def test_what_is_not_python(source: bytes, line: int, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_bytes(source)
    for read in (lint, fix):
        with pytest.raises(ConfigError, match=rf"broken\.py:{line}: not readable as Python"):
            read(path)
    assert path.read_bytes() == source


@pytest.mark.parametrize("text", ["(" * 5000 + ")" * 5000, "+".join("1" * 5000), "-" * 20000 + "1"])
def test_nesting_without_end(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.py.*nest"):
        lint(script(tmp_path, f"LoraConfig = {text}\n"))


def test_scripts_are_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    text = (CORPUS / "faulty_config_unused.py").read_text("utf-8")
    path = script(tmp_path, f"open({str(witness)!r}, 'w').close()\n{text}")
    assert fix(path).fixed and lint(path) == []
    assert not witness.exists()


def test_folders(tmp_path: Path) -> None:
    for name in ("b.py", "sub/a.py", ".hidden/c.py", "lib/site-packages/d.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        script(tmp_path, FAULTY["L7 bare"], name)
    assert [Path(found.path).name for found in lint_paths([tmp_path])] == ["b.py", "a.py"]
    assert len(lint_paths([tmp_path / "notes.txt", tmp_path / "b.py", tmp_path])) == 3
    with pytest.raises(ConfigError, match="no such file"):
        lint_paths([tmp_path / "missing.py"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \*\.py"):
        lint_paths([tmp_path / "empty"])


def test_all_unreadable_scripts_are_named_before_one_is_mended(tmp_path: Path) -> None:
    good = script(tmp_path, (CORPUS / "faulty_saves_base.py").read_text("utf-8"), "a.py")
    text = good.read_text("utf-8")
    script(tmp_path, "if\n", "b.py")
    script(tmp_path, "else\n", "c.py")
    with pytest.raises(ConfigError, match=r"(?s)b\.py:1.*c\.py:1"):
        run_lint([tmp_path], fix=True)
    assert good.read_text("utf-8") == text


def test_run_lint_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path, (CORPUS / "faulty_config_and_save.py").read_text("utf-8"))
    assert run_lint([path], as_json=True) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["num_files"] == 1 and values["fixed"] == [] and values["backups"] == {}
    (found,) = values["findings"]
    assert (found["code"], found["line"], found["column"], found["fixable"]) == ("L1", 23, 12, True)
    assert run_lint([path], fix=True, as_json=True) == 0
    values = json.loads(capsys.readouterr().out)
    assert [found["code"] for found in values["fixed"]] == ["L1", "L2"] and values["findings"] == []
    assert values["backups"] == {str(path): f"{path}.bak"}


def test_notes_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_lint([CORPUS / "noted_fp16.py"]) == 0
    assert "0 fault(s), 2 note(s)" in capsys.readouterr().out
    assert run_lint([CORPUS / "faulty_labels.py"]) == 1


def test_run_lint_prints_the_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lint_module, "Console", lambda: Console(width=200))
    path = script(tmp_path, (CORPUS / "faulty_saves_base.py").read_text("utf-8"))
    run_lint([path])
    printed = capsys.readouterr().out
    assert "train.py:32:5" in printed and "L2" in printed and "base_model is not what was trained" in printed
    run_lint([path], fix=True)
    printed = capsys.readouterr().out
    assert "mended L2; the original is" in printed and "+    model.save_pretrained(" in printed


def test_launcher(tmp_path: Path) -> None:
    path = script(tmp_path, (CORPUS / "faulty_saves_base.py").read_text("utf-8"))
    results = []
    for flags in ([str(path)], [str(path), "--fix", "--json"], [str(path)], [str(tmp_path / "missing.py")]):
        command = [sys.executable, str(ROOT / "fix_lora_training.py"), *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        results.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=False))
    assert [result.returncode for result in results] == [1, 0, 0, 2]
    assert len(json.loads(results[1].stdout)["fixed"]) == 1
    assert (
        "ConfigError" in results[3].stderr
        and "missing.py" in results[3].stderr
        and "Traceback" not in results[3].stderr
    )
