"""The whole model as the specification states it: numpy float64, one token after another, nothing shared with v4jax.

Sections are those of the V4 specification. Weights are the flat dict; `part` cuts one module out of it.
"""

import numpy as np

from v4jax.config import Model, RoPE


def part(flat: dict, prefix: str) -> dict[str, np.ndarray]:
    """Tensors below `prefix`, named from there, in float64."""
    return {n.removeprefix(prefix): np.asarray(a, np.float64) for n, a in flat.items() if n.startswith(prefix)}


def rms(x, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def frequencies(rope: RoPE, dim: int, compressed: bool) -> np.ndarray:
    """Section 2.3, pair by pair. A ramp may have no width, or run backwards, as in the release."""
    theta, result = (rope.compress_rope_theta if compressed else rope.rope_theta), []
    bend = lambda beta: dim * np.log(rope.yarn_original / (2 * np.pi * beta)) / (2 * np.log(theta))
    low, high = max(np.floor(bend(rope.yarn_beta_fast)), 0), min(np.ceil(bend(rope.yarn_beta_slow)), dim - 1)
    for j in range(dim // 2):
        f = theta ** (-2 * j / dim)
        if compressed:
            ramp = min(max((j - low) / (high - low or 1e-3), 0), 1)
            f = f * (1 - ramp) + f / rope.yarn_factor * ramp
        result.append(f)
    return np.array(result)


def rotate(x, position, freq):
    """Adjacent pairs of the last channels as complex numbers, turned by position * freq (a negative one turns back)."""
    out, n = np.array(x, np.float64), 2 * len(freq)
    tail = out[..., -n:]
    turned = (tail[..., 0::2] + 1j * tail[..., 1::2]) * np.exp(1j * position * freq)
    out[..., -n::2], out[..., out.shape[-1] - n + 1 :: 2] = turned.real, turned.imag
    return out


def softmax(z, axis):
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def compress(w, x, ratio, overlap, freq, eps):
    """Section 2.5: entries of all complete windows, one after another."""
    size = w["norm.scale"].shape[0]
    u, z = x @ w["kv"], x @ w["gate"]
    entries = []
    for i in range(len(x) // ratio):
        values, gates = [], []
        for j in range(ratio):
            t = i * ratio + j
            if overlap and i > 0:
                values.append(u[t - ratio, :size])
                gates.append(z[t - ratio, :size] + w["ape"][j, :size])
            values.append(u[t, size:] if overlap else u[t])
            gates.append(z[t, size:] + w["ape"][j, size:] if overlap else z[t] + w["ape"][j])
        pooled = np.sum(softmax(np.array(gates), 0) * np.array(values), 0)
        entries.append(rotate(rms(pooled, eps) * w["norm.scale"], i * ratio, freq))
    return np.array(entries).reshape(-1, size)


def attention(model: Model, kind: str, w, x):
    """Sections 2.3, 2.6, 2.7. Returns y [T, D] and the indexer's loss of every query [T]."""
    freq, ratio = frequencies(model.rope, model.qk_rope_head_dim, kind != "swa"), model.compress_rate(kind)
    low = rms(x @ w["q_down"], model.rms_norm_eps) * w["q_norm.scale"]
    kv = rms(x @ w["kv"], model.rms_norm_eps) * w["kv_norm.scale"]
    kv = np.array([rotate(row, t, freq) for t, row in enumerate(kv)])
    inner = {name.removeprefix("compressor."): a for name, a in w.items() if name.startswith("compressor.")}
    entries = compress(inner, x, ratio, kind == "csa", freq, model.rms_norm_eps) if ratio else kv[:0]
    if kind == "csa":
        inner = {n.removeprefix("indexer.compressor."): a for n, a in w.items() if n.startswith("indexer.compressor.")}
        keys = compress(inner, x, ratio, True, freq, model.rms_norm_eps)
    out, losses = [], []
    for t in range(len(x)):
        q = rotate(rms(np.einsum("q,qnh->nh", low[t], w["q_up"]), model.rms_norm_eps), t, freq)
        seen = list(range((t + 1) // ratio)) if ratio else []
        if kind == "csa":
            qi = rotate(np.einsum("q,qjl->jl", low[t], w["indexer.q_up"]), t, freq)
            wi = x[t] @ w["indexer.weight"] * (model.indexer.index_head_dim * model.indexer.index_n_heads) ** -0.5
            score = {i: wi @ np.maximum(qi @ keys[i], 0) for i in seen}
            seen = sorted(seen, key=lambda i: (-score[i], i))[: model.indexer.index_topk]
        near = list(range(max(0, t - model.sliding_window + 1), t + 1))
        rows = np.concatenate([kv[near], entries[seen]])
        logits = np.concatenate([q @ rows.T * model.head_dim**-0.5, w["sink"][:, None]], 1)
        p = softmax(logits, 1)[:, :-1]
        o = rotate(p @ rows, -t, freq).reshape(model.o_groups, -1)
        out.append(np.einsum("gr,grd->d", np.einsum("gi,gir->gr", o, w["o_down"]), w["o_up"]))
        losses.append(0.0)
        if kind == "csa" and seen:
            mass = p[:, len(near) :].sum(0)
            target, own = mass / mass.sum(), softmax(np.array([score[i] for i in seen]), 0)
            losses[-1] = np.sum(target * np.log(target / own))
    return np.array(out), np.array(losses)


def swiglu(gate, up, limit):
    gate = np.minimum(gate, limit)
    return gate / (1 + np.exp(-gate)) * np.clip(up, -limit, limit)


def moe(model: Model, w, x, ids):
    """Section 3."""
    m, out = model.moe, []
    for row, token in zip(x, ids, strict=True):
        s = np.sqrt(np.log1p(np.exp(row @ w["router.weight"])))
        if "router.table" in w:
            picks = w["router.table"][token].astype(int)
        else:
            picks = np.argsort(-(s + w["router.bias"]), kind="stable")[: m.num_experts_per_tok]
        weights = m.routed_scaling_factor * s[picks] / s[picks].sum()
        y = swiglu(*np.einsum("d,duf->uf", row, w["shared.gate_up"]), m.swiglu_limit) @ w["shared.down"]
        for e, weight in zip(picks, weights, strict=True):
            h = swiglu(*np.einsum("d,udf->uf", row, w["experts.gate_up"][e]), m.swiglu_limit)
            y = y + weight * h @ w["experts.down"][e]
        out.append(y)
    return np.array(out)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def hyper(model: Model, w, X, sublayer):
    """Sections 4.1, 4.2 around one sublayer, for X [T, X, D]."""
    n, eps = model.mhc.hc_mult, model.mhc.hc_eps
    reads, writes, mixes = [], [], []
    for v in X:
        m = np.einsum("mxd,xd->m", w["fn"], v) / np.sqrt(np.mean(v * v) + model.rms_norm_eps)
        reads.append(sigmoid(m[:n] * w["scale"][0] + w["base"][:n]) + eps)
        writes.append(2 * sigmoid(m[n : 2 * n] * w["scale"][1] + w["base"][n : 2 * n]))
        b = softmax((m[2 * n :] * w["scale"][2] + w["base"][2 * n :]).reshape(n, n), 1) + eps
        b = b / (b.sum(0, keepdims=True) + eps)
        for _ in range(model.mhc.hc_sinkhorn_iters - 1):
            b = b / (b.sum(1, keepdims=True) + eps)
            b = b / (b.sum(0, keepdims=True) + eps)
        mixes.append(b)
    y = sublayer(np.array([read @ v for read, v in zip(reads, X, strict=True)]))
    return np.array([np.outer(c, row) + b.T @ v for c, row, b, v in zip(writes, y, mixes, X, strict=True)])


def head_mix(model: Model, w, X):
    """Section 4.3."""
    out = []
    for v in X:
        m = np.einsum("yxd,xd->y", w["fn"], v) / np.sqrt(np.mean(v * v) + model.rms_norm_eps)
        out.append((sigmoid(m * w["scale"] + w["base"]) + model.mhc.hc_eps) @ v)
    return np.array(out)


def block(model: Model, kind: str, w, X, ids):
    """One layer; also the indexer's losses."""
    sub = lambda prefix: part(w, prefix)
    losses = []

    def attend(x):
        y, loss = attention(model, kind, sub("attn."), rms(x, model.rms_norm_eps) * w["attn_norm.scale"])
        losses.append(loss)
        return y

    X = hyper(model, sub("attn_mhc."), X, attend)
    ffn = lambda x: moe(model, sub("ffn."), rms(x, model.rms_norm_eps) * w["ffn_norm.scale"], ids)
    return hyper(model, sub("ffn_mhc."), X, ffn), losses[0]


def forward(model: Model, flat, ids):
    """One row of token ids: logits [T, V], the indexer's losses [layers, T] and the last streams [T, X, D]."""
    X = np.repeat(np.asarray(flat["embed.table"], np.float64)[ids][:, None], model.mhc.hc_mult, 1)
    losses = []
    for i, kind in enumerate(model.layer_types):
        X, loss = block(model, kind, part(flat, f"layers.{i}."), X, ids)
        losses.append(loss)
    h = rms(head_mix(model, part(flat, "head_mhc."), X), model.rms_norm_eps) * flat["norm.scale"]
    return h @ np.asarray(flat["head.weight"], np.float64), np.array(losses), X


def mtp(model: Model, flat, X, next_ids):
    """Section 5.1: logits of the token after the next one, from the streams and the next tokens."""
    w = part(flat, "mtp.0.")
    embed = np.asarray(flat["embed.table"], np.float64)[next_ids]
    hidden = rms(X, model.rms_norm_eps) * w["hidden_norm.scale"] @ w["hidden_proj"]
    hidden = hidden + (rms(embed, model.rms_norm_eps) * w["embed_norm.scale"] @ w["embed_proj"])[:, None]
    X, _ = block(model, "swa", part(w, "block."), hidden, next_ids)
    return (
        rms(head_mix(model, part(w, "head_mhc."), X), model.rms_norm_eps)
        * w["norm.scale"]
        @ np.asarray(flat["head.weight"], np.float64)
    )
