from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jpeft
from cli_folders import run, write_adapter
from jpeft.errors import AdapterError
from jpeft_interop.adapter_summary import summarise
from jpeft_interop.load_peft import load_peft
from jpeft_interop.torch_params import params_from_torch
from peft_twins import adapted, base, gpt2, llama, save

CONFIG = {
    "target_modules": ["q_proj", "down_proj", "embed_tokens"],
    "r": 3,
    "lora_alpha": 5,
    "use_rslora": True,
    "rank_pattern": {"down_proj": 2},
    "alpha_pattern": {"0.self_attn.q_proj": 7},
    "lora_bias": False,
    "modules_to_save": ["norm"],
}


def test_norms_are_those_of_pefts_change(tmp_path: Path) -> None:
    peft_model = adapted(base(llama), **CONFIG)
    summary = summarise(save(peft_model, tmp_path))
    modules = dict(peft_model.get_base_model().named_modules())
    assert len(summary.factors) == 5
    for one in summary.factors:
        layer = modules[one.module]
        change = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(one.norm, np.linalg.norm(change), rtol=1e-5)
        assert (one.rank, one.scaling) == (layer.r["default"], layer.scaling["default"])
        assert one.alpha == layer.lora_alpha["default"]
        assert one.norm_a > 0 and one.norm_b > 0 and one.dtype == "float32"
    assert [one.name for one in summary.plain][-1] == "model.norm.weight"
    assert summary.config["use_rslora"] is True and "lora_bias" not in summary.config


def test_a_folder_and_a_file_say_the_same(tmp_path: Path) -> None:
    module = base(gpt2)
    folder = write_adapter(
        tmp_path / "folder", module, target_modules=["c_attn", "wpe"], r=3, lora_bias=False, bias="all"
    )
    jpeft.save(tmp_path / "native.safetensors", load_peft(folder, params_from_torch(module)))
    one, other = summarise(folder), summarise(tmp_path / "native.safetensors")
    assert one.size == other.size and [x.module for x in one.factors] == [x.module for x in other.factors]
    for x, y in zip(one.factors, other.factors, strict=True):
        assert (x.rank, x.alpha, x.scaling) == (y.rank, y.alpha, pytest.approx(y.scaling))
        np.testing.assert_allclose([x.norm_a, x.norm_b, x.norm], [y.norm_a, y.norm_b, y.norm], rtol=1e-6)
    assert {x.name: x.size for x in one.plain} == {x.name: x.size for x in other.plain}


def test_stacked_kernels_and_rank_zero(tmp_path: Path) -> None:
    stack, head = jpeft.Kernel((4, 6, 5), (1,), (2,), (0,)), jpeft.Kernel((5, 2), (0,), (1,))
    ones = lambda kernel: {"kernel": np.ones(kernel.shape, np.float32)}
    params = {"layers": {"q": ones(stack)}, "head": ones(head)}
    kernels = jpeft.Kernels((("layers/q/kernel", stack), ("head/kernel", head)))
    spec = jpeft.LoRA(rank=2, alpha=3, targets=["q", "head"], rank_pattern={"head": 0})
    adapter = jpeft.init(jax.random.key(0), spec, params, kernels=kernels)
    adapter = adapter.replace(trained=jax.tree.map(lambda leaf: leaf + 0.5, adapter.trained))
    jpeft.save(tmp_path / "a.safetensors", adapter)
    factors = {one.module: one for one in summarise(tmp_path / "a.safetensors").factors}
    change = jpeft.apply(params, adapter)["layers"]["q"]["kernel"] - params["layers"]["q"]["kernel"]
    np.testing.assert_allclose(factors["layers.q"].norm, np.linalg.norm(change), rtol=1e-5)
    assert (factors["head"].rank, factors["head"].norm) == (0, 0.0)


def test_the_table(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, base(llama), **CONFIG)
    result = run("inspect", folder)
    assert result.exit_code == 0, result.exception
    assert "embed_tokens, q_proj" in result.stdout and "5 modules, rank 2, 3" in result.stdout
    brief = run("inspect", "--brief", folder).stdout
    assert "|A|" in result.stdout and "|A|" not in brief and "5 modules" in brief


def test_bad_input(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"12345678nonsense")
    for path, words in {
        "nowhere": "no such",
        "empty": "adapter_config.json",
        "broken.safetensors": "safetensors",
    }.items():
        result = run("inspect", tmp_path / path)
        assert result.exit_code == 1 and isinstance(result.exception, AdapterError)
        assert words in str(result.exception)


@pytest.mark.parametrize("debug", ["", "1"])
def test_one_line_and_no_traceback(debug: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import jpeft_interop.cli as cli; cli.main()",
        "inspect",
        str(tmp_path / "nowhere"),
    ]
    environment = {"PYTHONPATH": ":".join(sys.path), "JPEFT_DEBUG": debug, "PATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1 and not result.stdout
    assert ("Traceback" in result.stderr) == bool(debug)
    if not debug:
        assert result.stderr.startswith("jpeft: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(("package", "extra"), [("rich", "cli"), ("torch", "torch"), ("tokenizers", "interop")])
def test_a_missing_package_is_a_line(package: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from jpeft_interop import cli

    def missing(**_: object) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=f"{package}.inner")

    monkeypatch.setattr("jpeft_interop.cli.app.app", missing)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1 and f"pip install 'jpeft[{extra}]'" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from jpeft_interop import cli

    def broken(**_: object) -> None:
        raise ValueError("nobody meant this")

    monkeypatch.setattr("jpeft_interop.cli.app.app", broken)
    with pytest.raises(ValueError, match="nobody meant this"):
        cli.main()
