"""Writes the golden values: what later code is held to. The files are of 0.1.

The values are of the code as it stands when this is run, and replace those that are there: run it only where a change
of behaviour is meant, and say so in the changelog.
"""

import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import kit
import torch
import warm
from safetensors.torch import save_file

HERE = Path(__file__).parent
FILES = HERE / "files"
Values = dict[str, torch.Tensor]


def machine() -> dict[str, str]:
    """Where the same code gives the same bits."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else platform.processor()
    name = next((line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")), cpu)
    return {"cpu": name, "torch": torch.__version__, "simd": torch.backends.cpu.get_cpu_capability()}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(build: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def loss_options(kind: str) -> list[dict[str, Any]]:
    options: list[dict[str, Any]] = [{}, {"diagonal": True}, {"diagonal": False}, {"tau": 0.3}, {"tau": "auto"}]
    options += [{"pool": "mean"}, {"pool": "tokens"}, {"normalize": "layer"}, {"normalize": "unit"}]
    options += [{"norm_penalty": 0.1}, {"norm_penalty": 0.1, "diagonal": False}, {"t_window": 0.3}]
    options += [{"ignore_same_class": True}, {"ignore_same_class": True, "t_window": 0.4, "pool": "tokens"}]
    return [{"kind": kind, **one} for one in options]


def losses() -> Values:
    """Every kind with every option that fits it: (loss, gradient)."""
    found: Values = {}
    t, y = torch.linspace(0, 1, 6), torch.tensor([0, 1, 2, 0, 1, 1])
    for options in (one for kind in kit.KINDS for one in loss_options(kind)):
        for dtype in (torch.float64, torch.float32):
            z = (0.7 * normal(6, 3, 4)).to(dtype).requires_grad_()
            try:
                loss = kit.dispersive_loss(z, **options, t=t, y=y)
            except kit.DispersiveError:  # an option that this kind does not take
                continue
            (grad,) = torch.autograd.grad(loss, z)
            found[f"{options} {dtype}"] = torch.cat([loss[None], grad.flatten()]).detach()
    for kind in kit.KINDS:  # so large that float32 is computed in float32, and, once, in blocks of rows
        for shape in [(512, 32)] + [(4200, 4)] * (kind == "infonce_l2"):
            z = normal(*shape, dtype=torch.float32).requires_grad_()
            loss = kit.dispersive_loss(z, kind=kind)
            (grad,) = torch.autograd.grad(loss, z)
            found[f"{kind} {shape}"] = torch.cat([loss[None], grad.norm()[None], grad[:2].flatten()]).detach()
        for diagonal in (True, False):
            floors = [kit.floor(kind, 16, diagonal=diagonal, dim=8), kit.floor(kind, 7, diagonal=diagonal, dropped=4)]
            found[f"floor {kind} {diagonal}"] = torch.tensor(floors, dtype=torch.float64)
    return found


def plugged(reg: Any, model: Any, **given: Any) -> torch.Tensor:
    """Loss of two micro-batches, the gradient of both in the first layer, and the statistics of the second."""
    total: Any = 0.0
    for i in range(2):
        x, t = normal(6, 2, seed=i, dtype=torch.float32), torch.linspace(0.1, 0.9, 6)
        with reg:
            model(x, t, torch.arange(6) % 3)
        total = total + reg.loss(x0=x, **given)
    (grad,) = torch.autograd.grad(total, model.x_embedder.weight, allow_unused=True)
    numbers = list(reg.stats.read().values()) if hasattr(reg, "stats") else []
    reg.remove()
    return torch.cat([total.detach()[None], grad.flatten(), torch.tensor(numbers)])


def plug_ins() -> Values:
    """The plug-in with its presets and options, and its rivals, on a small network."""
    t, y = torch.linspace(0.1, 0.9, 6), torch.arange(6) % 3
    shapes = [("warmup", 8), ("cosine-to-zero", 8), ("stop-at", 8), ("constant", 0)]
    settings: list[Any] = [(preset, {}) for preset in ("paper", "official-pytorch", "small")]
    settings += [("paper", {"kind": kind}) for kind in kit.KINDS]
    settings += [("paper", {"schedule": kit.Schedule(*shape)}) for shape in shapes]
    settings += [("paper", {"at": "blocks.*"}), ("paper", {"memory": 4}), ("paper", {"weight": 0.0})]
    found: Values = {}
    for preset, options in settings:
        model = seeded(lambda: kit.MLP(hidden_size=16, num_classes=3))
        reg = kit.Dispersive.from_preset(model, preset, **options)
        if options.get("weight") == 0:
            with reg:
                model(normal(6, 2, dtype=torch.float32), t, y)
            reg.loss()
            found["measured only"] = torch.tensor(list(reg.stats.read().values()))
            continue
        found[f"{preset} {options}"] = plugged(reg, model, t=t, y=y, step=3)
    model = seeded(lambda: kit.MLP(hidden_size=16, num_classes=3))
    projector = seeded(lambda: torch.nn.Linear(16, 5))
    encoder = torch.tanh(normal(2, 5, dtype=torch.float32))
    found["norm matched"] = plugged(kit.NormMatched(model, "blocks.1", rms=1.3), model, step=1)
    found["layer sync"] = plugged(kit.LayerSync(model, "blocks.0", "blocks.2"), model, step=1)
    repa = kit.REPA(model, "blocks.1", encoder=lambda x: x @ encoder, projector=projector)
    found["repa"] = plugged(repa, model, step=1)
    return found


def field(x: torch.Tensor, t: torch.Tensor, y: Any = None, *, r: Any = None, taps: Any = ()) -> Any:
    """A model in closed form."""
    t, y, r = (0.0 if v is None else v.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) for v in (t, y, r))
    return (0.8 - t) * x + 0.1 * torch.sin(3 * x) + 0.05 * y + 0.02 * r


def twice(x: torch.Tensor, t: torch.Tensor, y: Any = None) -> torch.Tensor:
    return torch.cat([field(x, t, y), torch.tanh(x)], dim=1)


PATHS = {
    "linear": kit.LinearPath(), "gvp": kit.GVPPath(), "vp": kit.VPPath(), "ddpm": kit.DDPMPath(),
    "cosine": kit.DDPMPath("cosine"),
}  # fmt: skip


def sampled() -> Values:
    """Every sampler, with what it takes, and every guidance."""
    s, y, seeds = kit.samplers, torch.tensor([0, 1, 2]), [3, 4, 5]
    x, short = s.initial_noise(seeds, (2, 2)), s.time_grid(6, 1e-3, 1 - 1e-3)
    found: Values = {"noise": x, "grid": s.time_grid(5, 0.1, 0.9)}
    for name in ("euler", "heun", "rk4", "dopri5", "meanflow"):
        found[name] = getattr(s, name)(field, x, s.time_grid(5))
        found[f"{name} double"] = getattr(s, name)(field, x.double(), s.time_grid(5))
    found["dopri5 rtol"] = s.dopri5(field, x, [1.0, 0.0], rtol=1e-3, atol=1e-3)
    for name, path in PATHS.items():
        for prediction in ("x0", "eps", "v", "score"):
            how = {"path": path, "prediction": prediction}
            found[f"ddim {name} {prediction}"] = s.ddim(field, x, short, **how)
            found[f"sde {name} {prediction}"] = s.euler_maruyama(field, x, short, seeds=seeds, **how)
            found[f"ddpm {name} {prediction}"] = s.ddpm(field, x, short, seeds=seeds, **how)
    found["ddpm learned"] = s.ddpm(twice, x, s.time_grid(6), seeds=seeds, learned_variance=True)
    found["sde churn"] = s.euler_maruyama(field, x, s.time_grid(6), churn=0.4, seeds=seeds)
    guides = {
        "cfg": kit.ClassifierFree(y, 3, scale=2.0),
        "interval": kit.ClassifierFree(y, 3, scale=2.0, low=0.2, high=0.7),
        "scale 1": kit.ClassifierFree(y, None),
    }
    for name, guidance in guides.items():
        for sampler in ("heun", "dopri5", "meanflow", "ddim"):
            found[f"{name} {sampler}"] = getattr(s, sampler)(field, x, s.time_grid(4, 0.01, 0.99), guidance=guidance)
    return found


def objectives() -> Values:
    """Each objective's loss, draws and gradient, on the toy network and in closed form."""
    found: Values = {}
    kinds = {f"flow {n} {p}": kit.FlowMatching(v, p) for n, v in PATHS.items() for p in ("v", "x0", "eps", "score")}
    kinds |= {
        "flow logit": kit.FlowMatching(t_sampling="logit_normal"), "ddpm": kit.DDPM(),
        "ddpm cosine": kit.DDPM(PATHS["cosine"]), "meanflow": kit.MeanFlow(),
        "meanflow r": kit.MeanFlow(equal_share=0.2),
    }  # fmt: skip
    x0, y = normal(6, 2, dtype=torch.float32), torch.arange(6) % 3
    for name, objective in kinds.items():
        model = seeded(lambda: kit.MLP(hidden_size=16, num_classes=3, interval=True))
        taps = (1,) if "flow linear v" in name or "meanflow" in name else ()
        loss, aux = objective(model, x0, y, generator=torch.Generator().manual_seed(2), taps=taps)
        total = loss + sum(z.square().mean() for z in aux.taps)
        (grad,) = torch.autograd.grad(total, model.x_embedder.weight)
        found[name] = torch.cat([loss[None], aux.t, aux.per_sample, grad.flatten()]).detach()
    images = normal(4, 1, 2, 2, dtype=torch.float32).clamp(-1, 1)
    for path in (PATHS["ddpm"], PATHS["cosine"]):
        loss, aux = kit.DDPM(path, learn_sigma=True)(twice, images, generator=torch.Generator().manual_seed(2))
        found[f"learn_sigma {path.schedule}"] = torch.cat([loss[None], aux.per_sample])
    return found


def networks() -> Values:
    """Initial weights and outputs of the networks; the keys of the public checkpoints."""
    found: Values = {}
    size = {"input_size": 4, "patch_size": 2, "in_channels": 2, "num_classes": 3, **kit.DIT_CONFIGS["DiT-tiny"]}
    for options in ({}, {"learn_sigma": True}, {"interval": True}, {"time_scale": 1.0}, {"class_dropout_prob": 0.0}):
        model = seeded(lambda options=options: kit.DiT(**size, **options))
        with torch.no_grad():
            for layer in (*model.blocks, model.final_layer):
                layer.adaLN_modulation[-1].weight.fill_(0.02)
            model.final_layer.linear.weight.fill_(0.1)
        x, t = normal(3, 2, 4, 4, dtype=torch.float32), torch.tensor([0.0, 0.4, 1.0])
        out, taps = model(x, t, torch.arange(3), taps=(0,))
        found[f"DiT {options}"] = torch.cat([out.flatten(), taps[0].flatten()]).detach()
        found |= {f"DiT {options} {key}": norm for key, norm in norms(model.state_dict()).items()}
    for options in ({}, {"interval": True}, {"num_classes": 3}):
        model = seeded(lambda options=options: kit.MLP(hidden_size=16, **options))
        y = torch.arange(3) if options.get("num_classes") else None
        found[f"MLP {options}"] = model(normal(3, 2, dtype=torch.float32), torch.tensor([0.0, 0.4, 1.0]), y).detach()
        found |= {f"MLP {options} {key}": norm for key, norm in norms(model.state_dict()).items()}
    return found


def norms(tensors: Values) -> Values:
    return {key: torch.linalg.vector_norm(value.double()) for key, value in tensors.items()}


def configurations() -> dict[str, Any]:
    """Twenty steps each, of every objective, with and without the loss."""
    short = {"model": "DiT-short/2", "batch_size": 16, "preview_images": 0}
    short |= {"eval_every": 20, "checkpoint_every": 20, "log_every": 10}
    paper = {"regularizer.preset": "paper"}
    changes: dict[str, dict[str, Any]] = {
        f"{objective} {name}": {"objective": objective, **loss}
        for objective in ("flow", "ddpm", "meanflow")
        for name, loss in (("base", {}), ("paper", paper))
    }
    changes["accumulation"] = {**paper, "accumulation": 2}
    changes["memory"] = {**paper, "accumulation": 2, "regularizer.memory": 8}
    changes["placebo"] = {**paper, "regularizer.norm_matched": 1.5}
    changes["small"] = {"regularizer.preset": "small", "warmup_steps": 0, "flip": True}
    found = {name: kit.config("smoke", **short, **change) for name, change in changes.items()}
    toy = {"model": "MLP", "steps": 20, "batch_size": 64, "regularizer.preset": "small"}
    found["toy"] = kit.config("toy", **short | toy)
    return found


def trained(folder: Path) -> Values:
    """Every parameter after twenty steps, by its norm and the sum of its bits, and what was logged."""
    made = configurations()
    kit.train_all(list(made.values()), folder / "one")
    return {f"{n} {k}": v for i, n in enumerate(made) for k, v in summary(folder / "one" / str(i)).items()}


def trained_by_two(folder: Path) -> Values:
    made = configurations()
    gathered = kit.with_settings(made["accumulation"], {"regularizer.gather": True})
    made = {"two local": made["flow paper"], "two gathered": gathered}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "configs.json").write_text(json.dumps([kit.all_settings(one) for one in made.values()]))
    warm.run(HERE / "kit.py", folder / "configs.json", folder / "two", processes=2)
    return {f"{n} {k}": v for i, n in enumerate(made) for k, v in summary(folder / "two" / str(i)).items()}


def summary(run: Path) -> Values:
    lines = [sorted(line.items()) for line in kit.read_metrics(run)]
    logged = [value for line in lines for name, value in line if "depth_use" not in name]  # 0.1 had none
    found = {"metrics": torch.tensor(logged, dtype=torch.float64)}
    for name, tensors in kit.load_latest(run / "checkpoints").groups.items():
        ordered = [tensors[key] for key in sorted(tensors)]
        found[f"{name} norms"] = torch.stack([torch.linalg.vector_norm(one.double()) for one in ordered])
        bits = [one.contiguous().view(torch.uint8).long() for one in ordered if one.ndim]
        sums = [(one.flatten() * (torch.arange(one.numel()) % 9973 + 1)).sum() for one in bits]
        found[f"{name} bits"] = torch.stack(sums)
    return found


def resumed(folder: Path) -> Values:
    """The run of 0.1 that stopped after two steps of four, gone on with."""
    run = shutil.copytree(FILES / "run", folder / "run")
    list(kit.train(kit.read_config(run), run, resume=True))
    return {**summary(run), "samples": kit.sample_run(run)}


FAMILIES = {
    "losses": losses, "plug_ins": plug_ins, "sampled": sampled, "objectives": objectives, "networks": networks,
    "shipped": lambda: {name: kit.sample_run(name) for name in ("digits-base", "digits-paper")},
    "trained": trained, "trained_by_two": trained_by_two, "resumed": resumed,
}  # fmt: skip
IN_A_FOLDER = ("trained", "trained_by_two", "resumed")


def compute(family: str, folder: Path) -> Values:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums of several threads have other bits
    try:
        made = FAMILIES[family](folder / family) if family in IN_A_FOLDER else FAMILIES[family]()
    finally:
        torch.set_num_threads(threads)
    return {key: value.detach().clone().contiguous() for key, value in made.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        values = {f"{family}/{k}": v for family in FAMILIES for k, v in compute(family, Path(name)).items()}
    save_file(values, HERE / "values.safetensors", metadata=machine())
