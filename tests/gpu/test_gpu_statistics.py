"""Attention statistics by kernels on a GPU, against the torch code on the same GPU."""

import pytest
import torch

from l2kv.kernels.statistics import attention_statistics
from l2kv.probabilities import attention_probabilities, hide_unseen


def by_torch(query, key, width, options):
    probabilities = attention_probabilities(query, key, lambda scores: hide_unseen(scores, 0), options)[0]
    n, bins = query.shape[2], -(-query.shape[2] // width)
    padded = torch.nn.functional.pad(probabilities, (0, bins * width - n, 0, bins * width - n))
    return probabilities.sum(1), padded.unflatten(2, (bins, width)).sum(3).unflatten(1, (bins, width)).sum(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group,head_dim", [(4, 128), (3, 64), (1, 80), (2, 256)])
@pytest.mark.parametrize("n,width", [(2048, 16), (2048, 64), (2048, 256), (1999, 100), (150, 2)])
@pytest.mark.parametrize("capped", [False, True], ids=["plain", "soft cap and sinks"])
def test_kernels_give_what_torch_gives(cuda, n, width, group, head_dim, dtype, capped):
    torch.manual_seed(0)
    query = (2 * torch.randn(1, n, 2 * group, head_dim, device=cuda)).to(dtype).transpose(1, 2)
    key = torch.randn(1, n, 2, head_dim, device=cuda).to(dtype).transpose(1, 2)
    options = {"softcap": 5.0, "s_aux": torch.randn(2 * group, device=cuda)} if capped else {}
    got, again = (attention_statistics(query, key, width=width, options=options) for _ in range(2))
    for ours, twice, expected in zip(got[:2], again[:2], by_torch(query, key, width, options), strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-4, rtol=2e-4)  # of products that both sum in float32
        assert torch.equal(ours, twice)
