"""What is changed in the graphs of torch's compiler; it takes a while to import."""

from __future__ import annotations

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from archzoo.kernels import low_rank

_CONVERT = torch.ops.prims.convert_element_type.default
_PERMUTE = torch.ops.aten.permute.default
_PRODUCT = torch.ops.aten.mm.default
_PRODUCT_AS = torch.ops.aten.mm.dtype
_NARROW = (torch.bfloat16, torch.float16)
_OF_MERGED = torch.ops.archzoo.merged_weight_gradients.default
_OF_FACTORS = torch.ops.archzoo.low_rank_gradients.default


class WeightGradients(CustomGraphPass):
    """How gradients of weights are made of their products.

    Those of float32 weights come out in float32. Under autocast a weight is cast to bf16 for its
    product, so its gradient is made in bf16 and cast back: rounded, and written, read and written
    again by a kernel of its own. The product has summed it in float32 anyhow.

    Those of changes of low rank, whose weight is frozen, are made without that of the weight, where
    `archzoo.kernels.low_rank.cheaper_joined` says that this is faster.
    """

    def __call__(self, graph: Graph) -> None:
        """Change a graph in place."""
        self.in_float32(graph)
        self.of_low_rank(graph)
        graph.eliminate_dead_code()

    def in_float32(self, graph: Graph) -> None:
        """Where what is returned is a product cast to float32, let the product return it."""
        (output,) = graph.find_nodes(op="output")
        for node in graph.find_nodes(op="call_function", target=_CONVERT):
            wide = node.args[1] is torch.float32
            if not wide or node.meta["val"].device.type != "cuda" or set(node.users) != {output}:
                continue
            product = node.args[0]
            swapped = _is_transposed(product)
            if swapped and len(product.users) == 1:
                product = product.args[0]
            if not _is_product(product):
                continue
            with graph.inserting_before(node):
                first, second = product.args
                if swapped:  # (A B)^T = B^T A^T, which is written as the weight lies in memory
                    first, second = _transposed(graph, second), _transposed(graph, first)
                new = graph.call_function(_PRODUCT_AS, (first, second, torch.float32))
            new.meta["val"] = node.meta["val"].new_empty(node.meta["val"].shape)
            node.replace_all_uses_with(new)

    def of_low_rank(self, graph: Graph) -> None:
        """Where the gradient of a whole weight is made for that of its changes alone, leave it."""
        for node in graph.find_nodes(op="call_function", target=_OF_MERGED):
            product, firsts, *_ = node.args
            if product.meta["val"].device.type != "cuda" or len(product.users) != 1:
                continue
            rows, columns = product.meta["val"].shape
            swapped = _is_transposed(product)
            product = product.args[0] if swapped else product
            if not _is_product(product):
                continue
            first, second = product.args
            tokens = second.meta["val"].shape[0]  # a symbol says nothing of how many
            ranks = [one.meta["val"].shape[0] for one in firsts]
            many = isinstance(tokens, int)
            if not many or not low_rank.cheaper_joined(tokens, rows, columns, ranks):
                continue
            with graph.inserting_before(node):
                turned = _transposed(graph, first)  # of G^T x, or of (x^T G)^T
                grad, x = (second, turned) if swapped else (turned, second)
                new = graph.call_function(_OF_FACTORS, (grad, x, *node.args[1:]))
            new.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(new)
            graph.erase_node(node)

    def uuid(self) -> Any:
        """Of what decides: the compiler's cache holds what was made by it."""
        return get_hash_for_files((__file__, low_rank.__file__))


#: The one there is: the compiler takes what was compiled with another for something else.
WEIGHT_GRADIENTS = WeightGradients()


def _is_product(node: Any) -> bool:
    """Whether a node is a product of two narrow matrices that nothing else reads."""
    if not isinstance(node, Node) or node.target is not _PRODUCT or len(node.users) != 1:
        return False
    return all(one.meta["val"].dtype in _NARROW for one in node.args)  # type: ignore[union-attr]


def _is_transposed(node: Node) -> bool:
    """Whether a node is another matrix seen from its other side."""
    return node.target is _PERMUTE and list(node.args[1]) == [1, 0]  # type: ignore[arg-type]


def _transposed(graph: Graph, matrix: Any) -> Node:
    """A node for it."""
    found = graph.call_function(_PERMUTE, (matrix, [1, 0]))
    found.meta["val"] = matrix.meta["val"].permute(1, 0)
    return found
