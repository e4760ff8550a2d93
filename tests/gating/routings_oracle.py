"""Every routing once more, token by token in plain Python."""

from __future__ import annotations

import math

from .oracle import f32

Matrix = list[list[float]]
Kept = list[list[bool]]


def best(values: list[float], among: list[int] | None = None) -> int:
    """The index of the largest value, the lowest of equals."""
    return max(range(len(values)) if among is None else among, key=lambda e: (values[e], -e))


def grouped(scores: Matrix, top_k: int, num_groups: int, topk_groups: int, group_score: str) -> list[list[int]]:
    """The K best experts within the best groups."""
    answer = []
    for row in scores:
        size = len(row) // num_groups
        groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
        worth = [f32(sum(sorted((row[e] for e in group), reverse=True)[: 2 if group_score == "top2_sum" else 1])) for group in groups]
        chosen = sorted(range(num_groups), key=lambda g: (-worth[g], g))[:topk_groups]
        allowed = [e for g in chosen for e in groups[g]]
        answer.append(sorted(allowed, key=lambda e: (-row[e], e))[:top_k])
    return answer


def expert_choice(scores: Matrix, num_experts: int, limit: int, used: list[bool]) -> list[set[int]]:
    """The experts that took each token."""
    takers: list[set[int]] = [set() for _ in scores]
    for e in range(num_experts):
        ranked = sorted((t for t in range(len(scores)) if used[t]), key=lambda t: (-scores[t][e], t))
        for t in ranked[:limit]:
            takers[t].add(e)
    return takers


def fnv1a(data: bytes) -> int:
    value = 2166136261
    for byte in data:
        value = (value ^ byte) * 16777619 % 2**32
    return value


def hashed(token_id: int, num_experts: int, top_k: int) -> list[int]:
    chosen: list[int] = []
    for k in range(top_k):
        salt = k.to_bytes(4, "little") if k else b""
        expert = fnv1a(token_id.to_bytes(4, "little") + salt) % num_experts
        while expert in chosen:
            expert = (expert + 1) % num_experts
        chosen.append(expert)
    return chosen


def least_loaded(used: list[bool], num_experts: int, top_k: int) -> list[set[int] | None]:
    """The experts of each used token, greedily."""
    load = [0] * num_experts
    answer: list[set[int] | None] = []
    for is_used in used:
        if not is_used:
            answer.append(None)
            continue
        chosen = sorted(range(num_experts), key=lambda e: (load[e], e))[:top_k]
        for e in chosen:
            load[e] += 1
        answer.append(set(chosen))
    return answer


def mindformers(scores: Matrix, top_k: int, limit: int | None, used: list[bool]) -> tuple[list[list[int]], Kept, float]:
    """(ids, kept, loss) of one group, round by round."""
    num_tokens, num_experts = len(scores), len(scores[0]) if scores else 0
    left = [list(row) for row in scores]
    ids: list[list[int]] = [[] for _ in scores]
    kept: Kept = [[] for _ in scores]
    taken = [0] * num_experts
    loss = 0.0
    tokens = [t for t in range(num_tokens) if used[t]]
    for _ in range(top_k):
        share, proxy = [0.0] * num_experts, [0.0] * num_experts
        asked = [best(row) for row in left]
        for t in tokens:
            share[asked[t]] += 1 / len(tokens)
            total = sum(max(value, 0.0) for value in left[t])
            for e in range(num_experts):
                proxy[e] += max(left[t][e], 0.0) / (total + 1e-9) / len(tokens)
        loss += num_experts**2 * sum(a * b for a, b in zip(share, proxy, strict=True)) / max(num_experts, 1)
        for t in range(num_tokens):
            e = asked[t]
            is_kept = used[t] and (limit is None or taken[e] < limit)
            ids[t].append(e)
            kept[t].append(is_kept)
            if is_kept:
                taken[e] += 1
                left[t][e] = -1.0
    return ids, kept, loss


def sparsemixer(logits: Matrix, top_k: int, eps: float) -> tuple[list[list[int]], Matrix]:
    all_ids, all_weights = [], []
    for row in logits:
        ids: list[int] = []
        weights: list[float] = []
        for _ in range(top_k):
            left = [e for e in range(len(row)) if e not in ids]
            first = best(row, left)
            near = [e for e in left if row[first] == row[e] or (row[first] - row[e]) / max(abs(row[e]), row[first]) <= 2 * eps]
            weights.append(1 / sum(math.exp(row[e] - row[first]) for e in near))
            ids.append(first)
        all_ids.append(ids)
        all_weights.append(weights)
    return all_ids, all_weights


def similarity(hidden_states: Matrix, centroids: Matrix, top_k: int) -> tuple[list[list[int]], Matrix]:
    def cosine(a: list[float], b: list[float]) -> float:
        norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / max(norms, 1e-12)

    all_ids, all_weights = [], []
    for row in hidden_states:
        cosines = [cosine(row, centroid) for centroid in centroids]
        ids = sorted(range(len(centroids)), key=lambda e: (-cosines[e], e))[:top_k]
        total = sum(math.exp(cosines[e]) for e in ids)
        all_ids.append(ids)
        all_weights.append([math.exp(cosines[e]) / total for e in ids])
    return all_ids, all_weights
