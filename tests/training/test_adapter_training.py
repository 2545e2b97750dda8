"""Adapters trained by the one trainer: the base stays, the files that leave draw what the run draws, runs resume."""

import os
import signal
from pathlib import Path

import pytest
import torch
from commands import here, ldm
from finetuning import getattr_, run, same
from PIL import Image
from tiny_training import Killed, Spy, watched

from ldm import Pipeline
from ldm.adapters.content import Embedding, HypernetworkTensors, Lora, LowRank
from ldm.checkpoints.folder import all_folders
from ldm.checkpoints.load import load_any
from ldm.errors import ConfigError
from ldm.formats.adapters import write_adapter
from ldm.pictures import from_pil
from ldm.training.callbacks.saving import Interrupted

ALL = "adapter=[lora,textual_inversion,hypernetwork]"
SAYS = 'instance_prompt="a photo of a <new> cat"'
RATES = [f"adapter.{name}.lr=1e-2" for name in ("lora", "textual_inversion", "hypernetwork")]
PROMPT = "a photo of a <new> cat"


def draw(pipe, prompt=PROMPT, negative="a <new> dog", **options):
    return pipe.sample(prompt, negative, num_steps=3, seed=1, height=64, width=64, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sd1_folder, pictures):
    folder = tmp_path_factory.mktemp("trained")
    return run(folder, "finetune", "mine", f"checkpoint={sd1_folder}", f"images={pictures}", SAYS, ALL, *RATES)


@pytest.mark.slow
def test_the_base_stays_and_adapters_leave_as_files(trained, sd1_folder):
    base, after = load_any(sd1_folder), load_any(trained)
    for part in ("unet", "vae", "text_encoder"):
        assert same(getattr_(base, part), getattr_(after, part)), part
    exported = {p.name for p in (trained / "export/step-00000003").iterdir()}
    assert exported == {"mine.safetensors", "new.safetensors", "mine.pt"}
    # The run, the run on its base, and the files on the base are one model.
    pipes = [Pipeline.load(trained), Pipeline.load(sd1_folder), Pipeline.load(sd1_folder)]
    before = draw(pipes[1])
    pipes[1].load_adapter(trained)
    for name in sorted(exported):
        pipes[2].load_adapter(trained / "export/step-00000003" / name)
    drawn = [draw(pipe) for pipe in pipes]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2])
    assert not torch.allclose(drawn[0], before, atol=1e-3)
    pipes[2].unload_adapters()
    assert torch.equal(draw(pipes[2]), before)


@pytest.mark.slow
def test_a_model_with_a_lora_leaves_merged(trained, sd1_folder, tmp_path):
    pipe = Pipeline.load(sd1_folder)
    pipe.load_adapter(trained / "export/step-00000003/mine.safetensors", weight=0.7)
    drawn = draw(pipe)
    for format, name in (("diffusers", "folder"), ("ldm", "ours")):
        pipe.save(tmp_path / name, format)
        again = Pipeline.load(tmp_path / name)
        assert not again.adapters
        assert (draw(again) - drawn).abs().max() < 1e-4
    with pytest.raises(ConfigError, match=r"textual_inversion.*no checkpoint's weights can hold"):
        Pipeline.load(trained).save(tmp_path / "no")


@pytest.mark.slow
def test_a_fresh_process_draws_the_same(trained, sd1_folder, tmp_path):
    export = trained / "export/step-00000003"
    asked = [f"checkpoint={sd1_folder}", f"prompt={PROMPT}", "num_steps=3", "seed=1", "height=64", "width=64"]
    files = f"[{export}/mine.safetensors:0.5,{export}/new.safetensors]"
    result = ldm("task=sample", *asked, f"adapters={files}", "output=drawn", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    pipe = Pipeline.load(sd1_folder)
    pipe.load_adapter(export / "mine.safetensors", 0.5)
    pipe.load_adapter(export / "new.safetensors")
    drawn = pipe(PROMPT, num_steps=3, seed=1, height=64, width=64)[0]
    with Image.open(tmp_path / "drawn/0000.png") as written:
        assert torch.equal(from_pil(written), from_pil(drawn))
        assert f"{export}/mine.safetensors:0.5" in written.text["ldm"]
    # A LoRA goes from one program's layout into another's.
    result = here("task=convert", f"checkpoint={export}/mine.safetensors", "format=peft", "output=p.safetensors",
                  cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    pipe.unload_adapters()
    pipe.load_adapter(tmp_path / "p.safetensors", 0.5)
    pipe.load_adapter(export / "new.safetensors")
    assert torch.equal(from_pil(pipe(PROMPT, num_steps=3, seed=1, height=64, width=64)[0]), from_pil(drawn))


class Signal(Spy):
    """Ctrl-C in the middle of a step."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    from ldm.checkpoints.folder import load_parts

    return {f"{p}.{k}": v for p, part in load_parts(all_folders(run)[-1], "raw").items() for k, v in part.items()}


@pytest.mark.slow
@pytest.mark.parametrize("spy", [Spy(die_at=("backward", 3)), Signal()], ids=["killed", "interrupted"])
def test_stopped_it_leaves_files_and_goes_on_exactly(tmp_path, sd1_folder, pictures, monkeypatch, spy):
    options = [f"checkpoint={sd1_folder}", f"images={pictures}", SAYS, ALL, *RATES, "max_steps=5", "ema=decay"]
    options += ["callbacks.checkpoints.every_n_steps=2", "adapter.lora.dropout=0.1", "adapter.lora.dora=true"]
    whole = run(tmp_path / "a", "finetune", "mine", *options)
    with watched(monkeypatch, spy), pytest.raises((Killed, Interrupted)):
        run(tmp_path / "b", "finetune", "mine", *options)
    stopped = tmp_path / "b/outputs/mine"
    if isinstance(spy, Signal):
        (folder,) = (stopped / "export").iterdir()
        assert folder.name == "step-00000003"
        pipe = Pipeline.load(sd1_folder)
        for path in folder.iterdir():
            pipe.load_adapter(path)
        assert draw(pipe).isfinite().all()
    run(tmp_path / "b", "finetune", "mine", *options)
    ours, theirs = tensors(stopped), tensors(whole)
    assert ours.keys() == theirs.keys() and all(
        torch.equal(v.nan_to_num(), theirs[k].nan_to_num()) for k, v in ours.items()
    )
    assert [p.name for p in (stopped / "export").iterdir()] == ["step-00000005"]


@pytest.mark.slow
def test_going_on_from_an_adapter(trained, tmp_path, pictures):
    """checkpoint=RUN with the same adapters begins where they are; without them it is refused, not forgotten."""
    still = [f"adapter.{name}.lr=0.0" for name in ("lora", "textual_inversion", "hypernetwork")]
    again = run(tmp_path, "finetune", "again", f"checkpoint={trained}", f"images={pictures}", SAYS, ALL, *still)
    assert torch.equal(draw(Pipeline.load(again)), draw(Pipeline.load(trained)))
    for changed, said in (
        ("adapter.lora.alpha=1", "lora.alpha=1.*None"),
        ("adapter.hypernetwork.activation=relu", "linear"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(tmp_path, "finetune", "other", f"checkpoint={trained}", f"images={pictures}", SAYS, ALL, changed)
    with pytest.raises(ConfigError, match=r"trained with an adapter.*adapter=\[hypernetwork,lora,textual_inversion\]"):
        run(tmp_path, "finetune", "whole", f"checkpoint={trained}", f"images={pictures}")


@pytest.mark.slow
def test_what_cannot_be_is_said(trained, tmp_path, sd1_folder, pictures):
    export, pipe = trained / "export/step-00000003", Pipeline.load(sd1_folder)
    before = draw(pipe, guidance=1.0)
    for path in of_stable_diffusion_2(tmp_path):
        with pytest.raises(ConfigError, match=r"load the base that it was trained on"):
            pipe.load_adapter(path)
    assert not pipe.adapters and torch.equal(draw(pipe, guidance=1.0), before)
    # Of a run with several, one that cannot be attached takes the others off again.
    pipe.load_adapter(export / "new.safetensors")
    with pytest.raises(ConfigError, match="added before"):
        pipe.load_adapter(trained)
    pipe.unload_adapters()
    assert hooks(pipe) == 0 and torch.equal(draw(pipe, guidance=1.0), before)
    pipe = Pipeline.load(sd1_folder)
    with pytest.raises(ConfigError, match=r"no weight of their own.*prompt_weights=true"):
        pipe.load_adapter(export / "new.safetensors", weight=0.5)
    pipe.load_adapter(export / "new.safetensors", token="<other>")
    assert torch.equal(
        draw(pipe, "a <other> cat", ""), draw_with(sd1_folder, export / "new.safetensors", "a <new> cat")
    )
    with pytest.raises(ConfigError, match=r"whole model without adapters|not an adapter"):
        pipe.load_adapter(sd1_folder)
    inpaint = [f"checkpoint={sd1_folder}", f"images={pictures}", "adapter=[lora]"]
    with pytest.raises(ConfigError, match=r"no inputs for mask"):
        run(tmp_path, "inpaint", "bad", *inpaint)
    with pytest.raises(ConfigError, match=r"give checkpoint=PATH"):
        run(tmp_path, "finetune", "bad", f"images={pictures}", "adapter=[lora]")
    for bad, said in (
        (SAYS.replace("<new>", "cat"), "no caption says <new>"),
        ("adapter.lora.rank=0", "at least 1"),
        ("adapter.textual_inversion.placeholder=cat", "ordinary word"),
        ("adapter.hypernetwork.widths=[5]", "attentions read"),
        ("adapter.lora.format=gguf", "kohya, peft"),
    ):
        options = [f"checkpoint={sd1_folder}", f"images={pictures}", SAYS, ALL, bad]
        with pytest.raises(ConfigError, match=said):
            run(tmp_path, "finetune", "bad", *options)
        assert not (tmp_path / "outputs/bad").exists()


def hooks(pipe):
    sampler = pipe.sampler
    modules = [m for part in (sampler.denoiser.model, sampler.text_encoder) for m in part.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules) + len(sampler.text_encoder._words)


def of_stable_diffusion_2(folder):
    """Adapters for a text of 1024 numbers a token, as files."""
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    lora = Lora({layer: LowRank(torch.zeros(2, 1024), torch.zeros(32, 2), 2.0)})
    state = {f"linear.{i}.{n}": torch.zeros(s) for i in (0, 1) for n, s in SHAPES[i].items()}
    hypernetwork = HypernetworkTensors({1024: (state, state)}, activate_output=False)
    contents = {"lora.safetensors": (lora, "kohya"), "word.pt": (Embedding("<2>", torch.zeros(1, 1024)), "a1111")}
    for name, (content, format) in {**contents, "h.pt": (hypernetwork, "a1111")}.items():
        write_adapter(content, folder / name, format)
        yield folder / name


SHAPES = [{"weight": (2048, 1024), "bias": (2048,)}, {"weight": (1024, 2048), "bias": (1024,)}]


def draw_with(base, adapter, prompt):
    pipe = Pipeline.load(base)
    pipe.load_adapter(adapter)
    return draw(pipe, prompt, "").clone()
