"""Writing a step's keys and values into the paged cache."""

from torch import Tensor


def store_kv_ref(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """`store_kv` in plain PyTorch."""
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slot_mapping, v)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes row i of k and v to cache position slot_mapping[i].

    k, v: [num_tokens, num_kv_heads, head_dim] in the caches' dtype. k_cache, v_cache: [num_blocks, block_size,
    num_kv_heads, head_dim], contiguous. slot_mapping: int64 [num_tokens], block * block_size + offset, all different.
    """
    if k.is_cuda:
        from lora_kernels.triton_attention import store_kv_triton

        store_kv_triton(k, v, k_cache, v_cache, slot_mapping)
    else:
        store_kv_ref(k, v, k_cache, v_cache, slot_mapping)
