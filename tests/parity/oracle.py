"""transformers' `deepseek_v4` with the weights of our flat dict: what parity tests and golden files compare with."""

import numpy as np
import torch
import transformers

from v4jax.checkpoint import param_mapping
from v4jax.config import Model
from v4jax.models import hf_config

torch.set_num_threads(1)  # the tests run in several processes


def network(model: Model, flat: dict[str, np.ndarray]):
    """The model in transformers, float32, eager attention, every weight from `flat`."""
    config = transformers.AutoConfig.for_model(**hf_config.to_hf(model))
    net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    state, placed = net.state_dict(), set()
    for name, tensor in param_mapping.tensors(model).items():
        if name.startswith("mtp."):  # transformers has no MTP
            continue
        spelling = next(s for s in range(tensor.spellings) if tensor.first(s) in state)
        for piece in tensor.pieces(spelling):
            state[piece.name].copy_(torch.from_numpy(piece.to_hf(flat[name])))
            placed.add(piece.name)
    assert placed == set(state), f"left as initialized: {sorted(set(state) - placed)}"
    return net


@torch.no_grad()
def logits(net, tokens_BT: np.ndarray) -> np.ndarray:
    """Full forward without cache, [B, T, V]."""
    return net(torch.from_numpy(np.asarray(tokens_BT, np.int64)), use_cache=False).logits.numpy()


@torch.no_grad()
def greedy(net, tokens_T: np.ndarray, count: int) -> list[int]:
    """`count` tokens by transformers' own generate, with its cache and no stop token."""
    ids = torch.from_numpy(np.asarray(tokens_T, np.int64))[None]
    out = net.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, ids.shape[1] :].tolist()
