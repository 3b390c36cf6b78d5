"""Memory of a run by formula: what a rank holds at each moment of a step, for any settings and number of ranks.

Nothing is allocated and no weight or data is read: a model is its sizes. A moment is a sum of parts, the peak the largest
moment; each part's source stands beside it. Symbols: T tokens of a micro-batch, N of them counted, H hidden size, I
intermediate size, V vocabulary, L layers, c bytes of the compute precision. What is counted is what torch's allocator
hands out; CUDA's own memory and fragmentation are an allowance that is said apart, and is an assumption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from medtrain.kernels.logps_memory import LogpsMemory, logps_memory
from medtrain.trainer.config.settings import Config
from medtrain.trainer.model.lora import Adapters, linear_shapes, plan_adapters
from medtrain.trainer.model.nf4 import packed_shape
from medtrain.trainer.plan.precision import MASTER, Fp8Products, fp8_names, moment_bytes, update_bytes, weight_item
from medtrain.trainer.plan.sizes import Sizes, shapes_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GIB = 2**30

# Not measured by us: CUDA context, NCCL's and cuBLAS's own buffers; and what the caching allocator cannot use, since it
# keeps a pool for each stream (compute, gather, reduce) and blocks of unlike sizes.
CONTEXT_BYTES = 2 * GIB
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Unit:
    """One FSDP unit on one rank, bytes. ``stored``: its share of the weights; ``whole``: gathered in the compute
    precision; ``gradient``: its share of the gradients; ``trained``: number of its trained weights, all ranks together;
    ``moments``: Adam's, of its share; ``update``: the most for a moment while its share is updated."""

    stored: int
    whole: int
    gradient: int
    trained: int
    moments: int
    update: int


@dataclass(frozen=True)
class Moment:
    """``parts``: bytes by name, in the order of the table."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Model:
    """A model as planned for: its sizes, shapes and what is trained."""

    hf_config: PreTrainedConfig | Sizes
    shapes: dict[str, tuple[int, ...]]
    adapters: Adapters | None

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def num_trained(self) -> int:
        return self.num_parameters if self.adapters is None else self.adapters.num_parameters


@dataclass(frozen=True)
class Machine:
    """``device`` is ``cuda`` (what a plan is for) or ``cpu`` (where it is held against measurements)."""

    world_size: int
    device: str = "cuda"

    def has_mesh(self, compute: torch.dtype) -> bool:
        # Alone and in float32 there is no process group on a CPU (loop.train); under torchrun, and for bf16, there is.
        return self.world_size > 1 or compute != torch.float32


def read_model(config: Config, hf_config: PreTrainedConfig | Sizes) -> Model:
    if isinstance(hf_config, Sizes):
        shapes = shapes_of(hf_config)
    else:
        from medtrain.trainer.model.policy import parameter_shapes

        shapes = parameter_shapes(hf_config)
    return Model(hf_config, shapes, plan_adapters(config.lora, shapes))


def compute_dtype(config: Config, device: str) -> torch.dtype:
    """As prepare.compute_dtype_of, for the device planned for rather than this one."""
    choice = config.precision.compute
    if choice == "auto":
        choice = "bfloat16" if device == "cuda" else "float32"
    return getattr(torch, choice)


@dataclass(frozen=True)
class Step:
    """What decides the memory of one micro-batch, beside the model. ``keys``: tokens attended to, repeated prompts included;
    ``accumulates``: whether gradients of an earlier micro-batch of the step are there already."""

    tokens: int
    counted: int
    keys: int
    accumulates: bool
    rows: tuple[int, int] | None = None  # CPU: (segments, padded length) of the one group of trainer/model/attention.py


def planned_step(config: Config, world_size: int) -> Step:
    """The fullest micro-batch that packing allows, every token of it counted (RPO: prompts too, for want of data)."""
    capacity = config.optim.micro_batch_tokens
    if config.stage == "rpo":
        # A shared prompt is gathered again for the rejected side.
        keys = 2 * capacity if config.data.share_prompts else capacity
        return Step(capacity, capacity, keys, accumulates=True)
    # data/packing.py spreads a step's windows evenly over its micro-batches: none is fuller than the mean and one window.
    num = max(1, math.ceil(config.optim.batch_tokens / (capacity * world_size)))
    fullest = math.ceil(config.optim.batch_tokens / (num * world_size)) + config.data.seq_len
    tokens = min(capacity, fullest)
    return Step(tokens, tokens, tokens, accumulates=num > 1)


def units(config: Config, model: Model, machine: Machine, compute: torch.dtype, sharded: bool) -> tuple[Unit, Unit, Unit]:
    """(a decoder layer, the head, the root with the rest), as trainer/model/fsdp.py cuts them. A tied head's unit has the
    embedding, which is then not in the root."""
    c, adapters, world_size = compute.itemsize, model.adapters, machine.world_size
    linears = linear_shapes(model.shapes)
    in_fp8 = fp8_names(config, model.shapes) if config.precision.fp8_all_gather else frozenset()

    def unit(names: list[str]) -> Unit:
        stored = whole = gradient = trained = moments = update = 0
        for name in names:
            shape = model.shapes[name]
            # (shape, bytes stored, bytes gathered, trained?) of the weight and of the adapters beside it.
            gathered = 1 if name in in_fp8 else c
            tensors = [(shape, weight_item(config) if adapters is None else c, gathered, adapters is None)]
            if adapters is not None and name in linears:
                if adapters.base == "nf4":  # trainer/model/nf4.py: 0.5625 bytes a weight
                    tensors = [(packed_shape(*shape, compute), c, c, False)]
                if name.split(".")[-2] in adapters.targets:
                    tensors += [((adapters.rank, shape[1]), MASTER, c, True), ((shape[0], adapters.rank), MASTER, c, True)]
            for size, stored_item, gathered_item, is_trained in tensors:
                # FSDP2 cuts rows and fills the last rank's share up to the others' (FSDPParam.padded_sharded_param_size).
                rows = math.ceil(size[0] / world_size)
                share = rows * math.prod(size[1:])
                stored += share * stored_item
                whole += share * world_size * gathered_item if sharded else 0
                if is_trained:
                    gradient += share * stored_item
                    trained += share * world_size
                    moments += moment_bytes(config, (rows, *size[1:]))
                    update = max(update, update_bytes(config, (rows, *size[1:]), stored_item, machine.device))
        return Unit(stored, whole, gradient, trained, moments, update)

    layer = [name for name in model.shapes if name.startswith("model.layers.0.")]
    embedding, norm, head = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
    if head not in model.shapes:
        return unit(layer), unit([embedding]), unit([norm])
    return unit(layer), unit([head]), unit([embedding, norm])


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one decoder layer. ``saved``: kept by autograd from forward to backward, without ``product`` (the MLP's, freed
    first); ``selected``: kept by selective checkpointing beside the layer's input; ``forward``: the most alive at once in a
    forward that keeps nothing; ``mlp_backward``, ``end_backward``: beside what is saved, the most while the MLP's gradients are
    made, and at the layer's last node."""

    saved: int
    product: int
    selected: int
    forward: int
    mlp_backward: int
    end_backward: int


def layer_activations(settings: Config, model: Model, step: Step, compute: torch.dtype, device: str) -> LayerActivations:
    """From the forward of transformers' Qwen2DecoderLayer (Llama's and Mistral's are the same), tensor by tensor."""
    config, adapters, c = model.hf_config, model.adapters, compute.itemsize
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, head_dim(config)
    hidden, inner, t = config.hidden_size, config.intermediate_size, step.tokens
    targets = None if adapters is None else adapters.targets

    def input_saved(*names: str) -> bool:  # a linear layer keeps its input for dW, a frozen one with an adapter for dA
        return targets is None or any(name in targets for name in names)

    # RMSNorm: its input widened to float32 (in float32: the residual stream itself), and in front of a trained weight
    # the normalised rows.
    norm = t * hidden * 4 + (t * hidden * c if adapters is None else 0)
    saved = 2 * norm
    saved += t * hidden * c if input_saved("q_proj", "k_proj", "v_proj") else 0
    saved += t * hidden * c if input_saved("gate_proj", "up_proj") else 0
    if config.model_type == "qwen3":  # RMSNorm of each head's query and key
        saved += t * (heads + kv_heads) * width * (4 + (c if adapters is None else 0))
    # Attention keeps q, k, v, its output (which o_proj keeps too) and a float32 sum a query and head; rotary keeps nothing,
    # since its tables have no gradient.
    query, key = heads * width * c, kv_heads * width * c
    attended = t  # rows of what attention gives
    if device == "cuda":  # flash: keys and values gathered where prompts are shared
        saved += t * query * 2 + step.keys * key * 2 + t * heads * 4
    elif step.rows is None or step.rows[0] == 1:  # one segment: nothing gathered
        saved += t * query * 2 + t * key * 2 + t * heads * 4
    else:  # padded copies, and o_proj's input beside the padded output
        places = step.rows[0] * step.rows[1]
        saved += places * (query * 2 + key * 2 + heads * 4) + t * query
        attended = places
    # trainer/model/recompute.py: attention's output and sums, those of o_proj and up_proj.
    selected = attended * (query + heads * 4) + t * (hidden + inner) * c
    # SwiGLU keeps gate, silu(gate), up; down_proj keeps their product.
    saved += 3 * t * inner * c
    product = t * inner * c if input_saved("down_proj") else 0
    if adapters is not None:
        saved += len(adapters.targets) * t * adapters.rank * c  # x A, kept for dB
    # A forward that keeps nothing: residual, normed input, silu(gate), up and their product.
    forward = t * (2 * hidden + 3 * inner) * c
    # The gradients of the product, of silu(gate) and of up at once, beside the residual's.
    mlp_backward = t * (hidden + 3 * inner) * c
    # RMSNorm's backward: the residual's gradient, and float32 rows: the gradient, its two products, and pow's.
    end_backward = t * hidden * (2 * c + 3 * 4)
    if adapters is not None and adapters.base == "nf4":
        # dequantize(): two float32 copies and the result of the largest matrix.
        widened = max(math.prod(shape) for shape in linear_shapes(model.shapes).values()) * (4 + 4 + c)
        forward, mlp_backward = forward + widened, mlp_backward + widened
    if settings.precision.fp8 != "none":
        forward_fp8, backward_fp8 = mlp_in_fp8(settings, t, hidden, inner, c)
        forward, mlp_backward = max(forward, forward_fp8), max(mlp_backward, backward_fp8)
    return LayerActivations(saved, product, selected, forward, mlp_backward, end_backward)


def mlp_in_fp8(settings: Config, t: int, hidden: int, inner: int, c: int) -> tuple[int, int]:
    """``forward`` and ``mlp_backward`` of a layer whose products are in FP8: the MLP's are its largest."""
    products = Fp8Products(c, settings.precision.fp8_all_gather, settings.precision.fp8_emulate)
    narrow, wide, weight = t * hidden, t * inner, hidden * inner
    up, down = (narrow, weight, wide), (wide, weight, narrow)
    forward = max(
        (2 * narrow + wide) * c + products.forward(*up),  # silu(gate) is there when up comes
        (2 * narrow + wide) * c + products.forward(*down),
    )
    backward = max(
        # Gradient of the residual and the product, which down_proj kept; its dW is counted among the gradients.
        (narrow + wide) * c + products.backward(*down) - weight * c,
        (narrow + 2 * wide) * c + products.backward(*up),
        (2 * narrow + wide) * c + weight * c + products.backward(*up),  # gate's, beside up's dW
    )
    return forward, backward


def head_dim(config: PreTrainedConfig | Sizes) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def checkpoint_copy(config: Config, model: Model, machine: Machine) -> int:
    """Bytes of host memory that a rank keeps for the copy of its checkpoints: its share of trained weights and moments
    (trainer/weights/checkpoint.py)."""
    if not config.checkpoint.async_save:
        return 0
    compute = compute_dtype(config, machine.device)
    shards = replace(machine, world_size=machine.world_size // config.parallel.replicate)
    layer, head, root = units(config, model, shards, compute, sharded=True)
    num_layers = model.hf_config.num_hidden_layers
    # A trained weight's gradient is as large as the weight.
    return sum(n * (unit.gradient + unit.moments) for n, unit in ((num_layers, layer), (1, head), (1, root)))


def moments(config: Config, model: Model, machine: Machine, step: Step) -> list[Moment]:
    """What a rank holds at each moment of a step that could be the largest, once the optimizer has its states."""
    compute = compute_dtype(config, machine.device)
    c, num_shards = compute.itemsize, machine.world_size // config.parallel.replicate
    sharded = machine.has_mesh(compute) or config.precision.fp8_all_gather
    layer, head, root = units(config, model, replace(machine, world_size=num_shards), compute, sharded)
    num_layers, hidden = model.hf_config.num_hidden_layers, model.hf_config.hidden_size
    tied = "lm_head.weight" not in model.shapes
    t, n = step.tokens, step.counted

    weights = num_layers * layer.stored + head.stored + root.stored
    all_gradients = num_layers * layer.gradient + head.gradient + root.gradient
    # AdamW: two moments a trained weight, made in the first step.
    optimizer = num_layers * layer.moments + head.moments + root.moments
    # Between copies they are added up once a step: until then float32 sums stand in their place (FSDPParamGroup.
    # _partial_reduce_output), whatever the weights are kept in.
    summed = sum(n * unit.trained // num_shards * MASTER for n, unit in ((num_layers, layer), (1, head), (1, root)))
    added_up = max(all_gradients, summed) if config.parallel.replicate > 1 else all_gradients
    rounded = added_up > all_gradients  # the sums stay to the backward's end (AllReduceState) beside what is rounded of them
    gradients_so_far = added_up if step.accumulates else 0

    def buffers(unit: Unit) -> tuple[int, int, int]:
        """(its all-gather's flat buffer, its reduce-scatter's input, that one's output): torch's _fsdp_collectives.py. On one
        rank nothing is gathered: the cast is the copy; what is reduced is copied all the same."""
        gather, out = unit.whole if num_shards > 1 else 0, unit.trained // num_shards * MASTER
        if unit.gradient < out:  # rounded to the weight's dtype while the float32 sums are there
            out += unit.gradient
        return (gather, unit.trained * MASTER, out) if sharded else (0, 0, 0)

    def of_unit(unit: Unit) -> int:
        # Whole gradients in the compute precision; without a mesh they are the gradients themselves, or added to them.
        return unit.trained * c if sharded or step.accumulates else 0

    (layer_gather, layer_reduce, layer_out), (head_gather, head_reduce, head_out) = buffers(layer), buffers(head)
    _, root_reduce, root_out = buffers(root)
    # FSDP2 keeps the root gathered from forward to backward; a tied head's unit is gathered while the embedding is used.
    root_whole, tied_whole = root.whole, head.whole if tied else 0

    layer_acts = layer_activations(config, model, step, compute, machine.device)
    checkpointed = config.model.activation_checkpointing != "none"
    selected = layer_acts.selected if config.model.activation_checkpointing == "selective" else 0
    kept_a_layer = t * hidden * c + selected if checkpointed else layer_acts.saved + layer_acts.product
    # One tensor a token and model: ids, positions, rotary tables, and the hidden states between two layers.
    small = t * (8 * 5 + 2 * head_dim(model.hf_config) * c) + t * hidden * c
    final_norm = t * hidden * (4 + (c if model.adapters is None else 0))
    all_kept = num_layers * kept_a_layer + final_norm + small
    op = head_memory(config, model, n, compute, machine.device)
    head_rows = n * hidden * c  # the rows that count, gathered

    def moment(name: str, gradients: int, **parts: int) -> Moment:
        rest = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
        return Moment(name, rest | {key.replace("_", " "): value for key, value in parts.items() if value})

    # trainer/model/fsdp.py: layers that stay whole, and buffers of those gathered ahead (FSDP2's own order has one).
    keeps_whole = sharded and not config.parallel.reshard_after_forward
    num_ahead = min(max(config.parallel.prefetch, 1), num_layers)

    def layers_whole(before: int, at_work: int = 1) -> int:
        """A backward's layer at work, buffers ahead, and the ``before`` that are still to come where they are whole."""
        if keeps_whole:
            return (before + at_work) * layer.whole
        return at_work * layer.whole + num_ahead * layer_gather

    found = []
    # The reference or held-out pass: nothing is kept, and the reference's comes before there is an optimizer.
    without = head_memory(config, model, n, compute, machine.device, training=False)
    all_whole = num_layers * layer.whole if keeps_whole else 0
    one_layer = tied_whole + (1 + num_ahead) * layer_gather + layer.whole
    walk = root_whole + max(one_layer, head_gather + head.whole + all_whole, tied_whole + layer_gather + all_whole)
    found.append(
        Moment(
            "reference pass",
            {
                "weights": weights,
                "gathered weights": walk,
                "activations": small + max(layer_acts.forward, final_norm + head_rows),
                "head op": without.forward,
            },
        )
    )
    # The end of the forward: all layers' activations and the head at work.
    found.append(
        moment(
            "forward, head",
            gradients_so_far,
            gathered_weights=root_whole + head_gather + head.whole + all_whole,
            activations=all_kept + head_rows + t * hidden * c,
            head_op=op.forward,
        )
    )
    # The forward of the last layer: the unit's flat buffer lives until the next one's copy is out (AllGatherState).
    found.append(
        moment(
            "forward, last layer",
            gradients_so_far,
            gathered_weights=root_whole
            + tied_whole
            + layer_gather
            + max(layer.whole, all_whole)
            + (head_gather if config.parallel.prefetch and not tied else 0),
            activations=all_kept
            - final_norm
            + (layer_acts.forward if checkpointed else max(layer_acts.forward - layer_acts.saved, 0)),
        )
    )
    if config.parallel.prefetch and not keeps_whole:
        behind = min(config.parallel.prefetch, num_layers - 1)
        found.append(
            moment(
                "forward, gathering ahead",
                gradients_so_far,
                gathered_weights=root_whole + tied_whole + (1 + behind) * layer_gather + layer.whole,
                activations=(num_layers - behind) * kept_a_layer + small + (layer_acts.forward if checkpointed else 0),
            )
        )
    # The head's backward, the last layer's weights on their way; then its reduce-scatter, whose input is float32.
    found.append(
        moment(
            "backward, head",
            gradients_so_far,
            gathered_weights=root_whole + head.whole + layers_whole(num_layers, 0),
            activations=all_kept + head_rows,
            head_op=op.backward,
            gradients_of_a_unit=of_unit(head) or head.gradient,
        )
    )
    if head.trained and not tied:
        found.append(
            moment(
                "backward, head's reduction",
                gradients_so_far,
                gathered_weights=root_whole + layers_whole(num_layers, 0),
                activations=all_kept + head_rows,
                gradients_of_a_unit=of_unit(head),
                reduce_buffers=head_reduce + head_out,
            )
        )
    # A layer's backward: it is whole, the next one's buffer gathered ahead, the reduce-scatter's input of the one before kept
    # until its own post-backward. The last layer meets all activations and the head's reduction, the first one all gradients.
    for name, before, reduce_before, done in (
        ("last", num_layers - 1, 0 if tied else head_reduce, 0 if tied else head.gradient),
        ("first", 0, layer_reduce, all_gradients - root.gradient - layer.gradient),
    ):
        gradients = added_up + (done if rounded else 0) if step.accumulates else done
        common = {"gathered_weights": root_whole + tied_whole + layers_whole(before), "reduce_buffers": reduce_before}
        if tied:
            common["gradients_of_a_unit"] = of_unit(head)
        fresh = before * kept_a_layer + (t * hidden * c if checkpointed else 0) + small
        found.append(
            moment(
                f"backward, {name} layer's MLP",
                gradients,
                **common
                | {
                    "activations": fresh + layer_acts.saved,
                    "temporaries": layer_acts.mlp_backward,
                    "gradients_of_a_unit": common.get("gradients_of_a_unit", 0) + mlp_share(model, of_unit(layer)),
                },
            )
        )
        found.append(
            moment(
                f"backward, {name} layer's end",
                gradients,
                **common
                | {
                    "activations": fresh + t * hidden * 4,
                    "temporaries": layer_acts.end_backward,
                    "gradients_of_a_unit": common.get("gradients_of_a_unit", 0) + of_unit(layer),
                },
            )
        )
        found.append(
            moment(
                f"backward, {name} layer's reduction",
                gradients,
                gathered_weights=root_whole + tied_whole + layers_whole(before, 0),
                activations=fresh,
                reduce_buffers=layer_reduce + layer_out,
                gradients_of_a_unit=common.get("gradients_of_a_unit", 0) + of_unit(layer),
            )
        )
    # The embedding's gradient is dense, and comes when all others are there.
    others = all_gradients - (root.gradient if sharded else 0)
    if step.accumulates:
        gradients = added_up + (others if rounded else 0)
    else:
        gradients = others
    last, last_reduce, last_out = (head, head_reduce, head_out) if tied else (root, root_reduce, root_out)
    if last.trained:
        twice = 2 if tied else 1  # of the head and of the embedding, before they are added
        found.append(
            moment(
                "backward, embedding",
                gradients,
                gathered_weights=root_whole + tied_whole,
                reduce_buffers=layer_reduce,
                gradients_of_a_unit=twice * of_unit(last),
                activations=small,
            )
        )
        found.append(
            moment(
                "backward, embedding's reduction",
                gradients,
                gathered_weights=0,
                reduce_buffers=last_reduce + last_out,
                gradients_of_a_unit=of_unit(last),
                activations=small,
            )
        )
    found.append(moment("optimizer step", all_gradients, temporaries=max(layer.update, head.update, root.update)))
    return found


def allowance(peak: int, device: str) -> int:
    """What is not torch's own count, on CUDA: an assumption (see CONTEXT_BYTES, FRAGMENTATION), to be replaced by measurement."""
    return CONTEXT_BYTES + int(FRAGMENTATION * peak) if device == "cuda" else 0


def mlp_share(model: Model, gradient_bytes: int) -> int:
    """Of a layer's whole gradients, those there at the MLP's peak: of its last matrix."""
    if model.adapters is not None:
        return gradient_bytes
    shapes = {name: shape for name, shape in model.shapes.items() if name.startswith("model.layers.0.")}
    down = math.prod(shapes["model.layers.0.mlp.down_proj.weight"])
    return gradient_bytes * down // sum(math.prod(shape) for shape in shapes.values())


def head_memory(
    config: Config, model: Model, counted: int, compute: torch.dtype, device: str, training: bool = True
) -> LogpsMemory:
    """kernels/logps_memory.py's formula, held against measurements there."""
    hidden, vocab = model.hf_config.hidden_size, model.hf_config.vocab_size
    return logps_memory(
        counted,
        hidden,
        vocab,
        compute,
        trains_hidden=training,
        trains_weight=training and model.adapters is None,
        keep_bytes=config.model.keep_bytes,
        path="triton" if device == "cuda" else "torch",
    )
