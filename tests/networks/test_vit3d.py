"""The video transformer against closed forms and loops; logits beside transformers: tests/benchmarks/methods/vit.py."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch
from torch import Tensor, nn

from methods._transformers import insert_drops
from networks.vit3d import Attention, PatchEmbed, VisionTransformer3D, rotary_tables, rotate, sinusoid, vit3d
from utils import draws
from utils.draws import Dropout, DropPath


def small(**options: object) -> VisionTransformer3D:
    torch.manual_seed(0)
    return vit3d(**{"width": 24, "depth": 3, "heads": 2, "patch": 4, **options}).double()


def clips(frames: int = 4, height: int = 8, width: int = 12) -> Tensor:
    return torch.randn(2, 3, frames, height, width, generator=torch.Generator().manual_seed(1)).double()


def test_patches_are_those_of_a_strided_convolution() -> None:
    torch.manual_seed(0)
    ours = PatchEmbed(10, 4, 2).double()
    peer = nn.Conv3d(3, 10, (2, 4, 4), (2, 4, 4)).double()
    peer.load_state_dict(ours.state_dict())
    x = clips()
    for given in (x, x.contiguous(memory_format=torch.channels_last_3d)):
        tokens, expected = ours(given), peer(x).flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, expected, rtol=1e-12, atol=1e-12)
        tokens.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(ours.weight.grad, peer.weight.grad, rtol=1e-12, atol=1e-12)
        ours.zero_grad()
        peer.zero_grad()


@pytest.mark.parametrize(("shape", "message"), [((3, 8, 8), "T = 3; .* multiple of 2"), ((4, 8, 10), "W = 10; .* 4")])
def test_a_clip_of_another_size_is_refused(shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()(clips(*shape))


def test_a_single_frame_is_repeated() -> None:
    net, one = small().eval(), clips(1)
    assert torch.equal(net(one), net(one.expand(-1, -1, 2, -1, -1)))


def test_sinusoid_values() -> None:
    table = sinusoid(3, 5).double()
    assert table[0].tolist() == [0, 1, 0, 1, 0]
    rate = 10000 ** (-2 / 5)
    expected = [math.sin(2), math.cos(2), math.sin(2 * rate), math.cos(2 * rate), math.sin(2 * rate**2)]
    torch.testing.assert_close(table[2], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)


def test_positions_are_in_no_file_and_one_table_serves_training_after_inference() -> None:
    for positions in ("sinusoid", "rotary"):
        net = small(positions=positions)
        assert not list(net.buffers())
        assert {key.split(".")[0] for key in net.state_dict()} == {"patch_embed", "blocks"}
        with torch.inference_mode():
            before = net(clips())
        out = net(clips())
        out.sum().backward()
        assert torch.equal(out, before)
        assert torch.equal(copy.deepcopy(net)(clips()), before)
        assert net(clips(8, 4, 4)).shape == (2, 4, 24)  # another grid, another table


def looped_rotary(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """One head's (N, head_dim), channel by channel as section 3.5 of the fact sheet writes it."""
    head_dim, out = x.shape[1], x.clone()
    dim = 2 * ((head_dim // 3) // 2)
    for n in range(len(x)):
        place = (n // (grid[1] * grid[2]), n // grid[2] % grid[1], n % grid[2])
        for axis in range(3):
            for i in range(dim):
                channel = axis * dim + i
                angle = place[axis] * 10000 ** (-(i % (dim // 2)) / (dim / 2))
                neighbour = -x[n, channel + 1] if i % 2 == 0 else x[n, channel - 1]
                out[n, channel] = x[n, channel] * math.cos(angle) + neighbour * math.sin(angle)
    return out


@pytest.mark.parametrize("head_dim", [5, 12, 13, 20, 64])
def test_rotary_positions_against_a_loop(head_dim: int) -> None:
    grid = (2, 3, 4)
    x = torch.randn(1, math.prod(grid), 3, head_dim, generator=torch.Generator().manual_seed(2)).double()
    ours = rotate(x, *rotary_tables(grid, head_dim, x))
    for head in range(3):
        torch.testing.assert_close(ours[0, :, head], looped_rotary(x[0, :, head], grid), rtol=1e-12, atol=1e-12)


def test_angles_are_float32_under_autocast() -> None:
    """Place 300 in bfloat16 is 300, but place 301 is not: angles of that type would be wrong by a radian."""
    net = small(positions="rotary", width=24, heads=1).float()
    x = torch.randn(1, 3, 2, 4, 4 * 600)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x)
    assert out.dtype == torch.float32
    assert {table.dtype for table in net._table[1]} == {torch.float32}
    turned = rotate(torch.ones(1, 600, 1, 24, dtype=torch.bfloat16), *net._table[1])
    assert turned.dtype == torch.bfloat16
    exact = rotate(torch.ones(1, 600, 1, 24).double(), *rotary_tables((1, 1, 600), 24, torch.ones(1).double()))
    assert (turned.double() - exact).abs().max() < 0.01


@pytest.mark.parametrize("qkv_bias", ["qv", "all", "none"])
@torch.no_grad()
def test_attention_against_a_loop(qkv_bias: str) -> None:
    torch.manual_seed(0)
    net, x = Attention(6, 2, qkv_bias).double(), torch.randn(1, 5, 6).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    zero = torch.zeros(6).double()
    biases = {"none": (zero,) * 3, "qv": (net.q_bias, zero, net.v_bias)}.get(qkv_bias) or net.qkv.bias.split(6)
    q, k, v = (x[0] @ w.T + b for w, b in zip(net.qkv.weight.split(6), biases, strict=True))
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        scores = torch.tensor([[float(a @ b) / math.sqrt(3) for b in k[:, part]] for a in q[:, part]]).double()
        heads.append(scores.softmax(1) @ v[:, part])
    torch.testing.assert_close(net(x)[0], net.proj(torch.cat(heads, 1)), rtol=1e-6, atol=1e-6)


def test_dropped_attention_without_a_drop_is_the_fused_one() -> None:
    net = Attention(8, 2, "all").double()
    x = torch.randn(2, 7, 8).double()
    fused = net(x)
    net.attention_drop = Dropout(0.0)
    torch.testing.assert_close(net(x), fused, rtol=1e-10, atol=1e-12)


def test_drop_path_rises_linearly_and_drops_whole_clips() -> None:
    net = insert_drops(small(depth=5), drop_path=0.4, attention_dropout=0.0)
    rates = [getattr(block.drop_path1, "p", 0.0) for block in net.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [getattr(block.drop_path2, "p", 0.0) for block in net.blocks] == rates
    assert not any(isinstance(module, Dropout) and not isinstance(module, DropPath) for module in net.modules())
    deep = draws.prepare(insert_drops(small(depth=2), drop_path=0.99, attention_dropout=0.0))
    block = deep.get_submodule("blocks.1")
    x = torch.randn(2, 3, 24).double()
    with draws.rng_scope(0, 0, (0, 1), 1):
        assert torch.equal(block(x), x)  # both clips, both branches
    assert not torch.equal(block.eval()(x), x)


def gradients(*, elsewhere: bool, **options: object) -> list[Tensor]:
    net = draws.prepare(insert_drops(small(**options), drop_path=0.5, attention_dropout=0.3))
    with draws.rng_scope(4, 2, (0, 3), 1):
        loss = net(clips()).square().sum()
    if elsewhere:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    else:
        loss.backward()
    grads = []
    for parameter in net.parameters():
        assert parameter.grad is not None
        grads.append(parameter.grad)
    return grads


@pytest.mark.parametrize("positions", ["sinusoid", "rotary"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_checkpointing_gives_the_same_bits(positions: str, elsewhere: bool) -> None:
    """Also where the backward pass runs outside the step's draws, and in a thread of its own as on a GPU."""
    kept = gradients(elsewhere=False, positions=positions)
    again = gradients(elsewhere=elsewhere, positions=positions, checkpointing=True)
    assert all(torch.equal(first, second) for first, second in zip(kept, again, strict=True))


def test_checkpointing_keeps_one_tensor_a_block() -> None:
    def kept(**options: object) -> int:
        net, tensors = small(depth=6, **options), {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: tensors.setdefault(x.data_ptr(), x), lambda x: x):
            net(clips())
        return sum(tensor.numel() for tensor in tensors.values())

    assert kept(checkpointing=True) < 0.3 * kept()


def test_frozen_blocks_do_not_learn_and_do_not_draw() -> None:
    net = insert_drops(small(freeze=2), drop_path=0.9, attention_dropout=0.5).train()
    assert [block.training for block in net.blocks] == [False, False, True]
    net(clips()).sum().backward()
    learning = {name.split(".")[1] for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert learning == {"2"}
    first, second = (net.blocks[1](torch.ones(1, 2, 24).double()) for _ in range(2))
    assert torch.equal(first, second)
    assert all(parameter.requires_grad for parameter in small().parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": 4}, "freeze is 4; there are 3 blocks"),
        ({"heads": 5}, "width 24 is not a multiple of the 5 heads"),
        ({"tubelet": 0}, "tubelet is 0"),
        ({"positions": "learned"}, "must be one of sinusoid, rotary"),
        ({"qkv_bias": "k"}, "must be one of qv, all, none"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(("name", "rate"), [("drop_path", 1.0), ("attention_dropout", -0.1)])
def test_rates_that_are_none_are_refused(name: str, rate: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {rate}"):
        insert_drops(small(), **{"drop_path": 0.0, "attention_dropout": 0.0, name: rate})
