"""Models whose weights are spread over two processes: FSDP2 is looked through, FSDP1 is refused with what helps."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from engine_cases import lively, vit
from torch import nn

from attrib_zoo import RISE, TTAME, GradCAM, ScoreCAM
from attrib_zoo.errors import UnsupportedModelError
from attrib_zoo.training.checkpoint import fingerprint

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)
fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("this torch has no fully_shard", allow_module_level=True)

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
STEPS = 3


def flattened(mesh):
    from timm.models.vision_transformer import Block
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({Block})
    return fsdp.FullyShardedDataParallel(
        vit(), device_mesh=mesh, device_id=torch.device("cpu"), auto_wrap_policy=policy
    )


def sharded(mesh):
    model = vit()
    for block in model.blocks:
        fsdp.fully_shard(block, mesh=mesh)
    return fsdp.fully_shard(model, mesh=mesh)


def explained(model, rank):
    """What each kind of method says of this process's own images."""
    mine = IMAGES[2 * rank : 2 * rank + 2]
    found = {"layers": [tap.name for tap in TTAME(model, recipe="paper").taps(mine)], "weights": fingerprint(model)}
    found["gradient"] = GradCAM(model).attribute(mine, 1)
    found["masked"] = ScoreCAM(model).attribute(mine, 1)
    return found


def trained(model, batches):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TTAME(model, recipe="paper").fit(batches, max_steps=STEPS, show_progress=False)


def work(rank, folder):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    mine = IMAGES[2 * rank : 2 * rank + 2]
    model = sharded(mesh)
    found = explained(model, rank)
    explainer = trained(model, [mine])
    found["trained"] = explainer.attribute(mine, 1)
    for part in (model, *model.blocks):
        part.reshard()
    found["local"] = sum(p.to_local().numel() for p in model.parameters())
    explainer.save(folder / f"explainer {rank}.safetensors")

    flat = flattened(mesh)
    with pytest.raises(UnsupportedModelError) as caught:
        GradCAM(flat).attribute(mine, 1)
    found["refused"] = str(caught.value)
    found["scores only"] = RISE(flat, n_masks=4).attribute(mine, 1)
    copy = lively(vit(), seed=1)
    copy.load_state_dict(get_model_state_dict(flat, options=StateDictOptions(full_state_dict=True)))
    found["copy"] = GradCAM(copy).attribute(mine, 1)
    torch.save(found, folder / f"found {rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    processes.spawn(work, (folder,), nprocs=2)
    return folder, [torch.load(folder / f"found {rank}", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
def test_fully_shard_changes_nothing(ranks):
    for rank, found in enumerate(ranks[1]):
        for name, expected in explained(vit(), rank).items():
            if isinstance(expected, torch.Tensor):
                assert expected.any()
                torch.testing.assert_close(found[name], expected)
            else:
                assert found[name] == expected, name


@pytest.mark.slow
def test_an_explainer_is_trained_on_a_sharded_model_and_serves_the_whole_one(ranks):
    folder, found = ranks
    assert sum(each["local"] for each in found) == sum(p.numel() for p in vit().parameters())
    for rank in (0, 1):
        loaded = TTAME.load(folder / f"explainer {rank}.safetensors", vit())  # the same weights, so the same model
        assert found[rank]["trained"].any()
        mine = IMAGES[2 * rank : 2 * rank + 2]
        torch.testing.assert_close(loaded.attribute(mine, 1), found[rank]["trained"])


@pytest.mark.slow
def test_flattened_weights_are_refused_with_what_helps(ranks):
    for rank, found in enumerate(ranks[1]):
        assert found["refused"].startswith("model: FullyShardedDataParallel flattens the weights of its layers")
        assert "fully_shard instead, or explain an ordinary copy" in found["refused"]
        assert found["scores only"].any()
        torch.testing.assert_close(found["copy"], explained(vit(), rank)["gradient"])


class Flat(nn.Module):
    """Stands for FullyShardedDataParallel where no process group is."""


def test_a_part_is_enough(monkeypatch):
    monkeypatch.setattr(fsdp, "FullyShardedDataParallel", Flat)
    with pytest.raises(UnsupportedModelError, match="FullyShardedDataParallel flattens the weights"):
        GradCAM(nn.Sequential(vit(), Flat())).attribute(IMAGES, 1)
