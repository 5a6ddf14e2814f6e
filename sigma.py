"""SIGMA: Sinkhorn-Guided Masked Video Modeling (Salehi et al., ECCV 2024, arXiv 2407.15447), in one file.

The file is the paper's method section as code, in the paper's order:

    tubes and mask  ->  video model Ψ  ->  projection network φ  ->  Sinkhorn  ->  loss

A clip is cut into space-time tubes, 90% of them are hidden. Ψ sees the visible tubes and predicts a feature for every
hidden one; φ embeds the pixels of those same hidden tubes. Both features are scored against K shared prototypes, an
equipartitioned optimal transport (Sinkhorn) turns the scores into cluster assignments, and each branch learns to
predict the assignment of the other:

    model = SIGMA(size="base", target="mlp")
    mask = tube_mask(batch=2, frames=8, patches=196)             # keep it on the CPU: counting it then costs no sync
    loss, stats = model(video, mask)                             # video: ImageNet-normalised [2, 3, 16, 224, 224]
    loss.backward()

Letters in the shape comments: B clips, N tubes of a clip, n visible and M masked ones (n + M = N), T frames, P numbers
in a tube, D and d width of encoder and decoder, F width of the target features, K prototypes.

Every top-level function and class can be pasted, with those it calls and the constants it names (TUBELET, IMAGENET_STD,
SIZES, TEACHERS), under `import torch`; SIGMA and load_checkpoint also want the standard library's modules below. "The
release" is the authors' code; where text and release differ the release decides, because its numbers are the published ones.
"""
import argparse
import math
import pickle
import re
import warnings

import torch

TUBELET = 2                                      # frames in a tube, at every size
IMAGENET_STD = (0.229, 0.224, 0.225)             # red, green, blue

# Ψ's shape at each size; decoder heads are 64 wide as well. `tiny` is ours, for 48-pixel clips on a laptop.
#          patch | encoder: width depth heads | decoder: width depth heads | φ: hidden widths and F
SIZES = {
    "tiny":  (8,  (128,  4,  2), (64,  2, 1), (256, 64)),
    "small": (16, (384,  12, 6), (192, 4, 3), (1024, 1024, 512, 256)),
    "base":  (16, (768,  12, 12), (384, 4, 6), (1024, 1024, 512, 256)),
    "large": (16, (1024, 24, 16), (512, 4, 8), (1024, 1024, 512, 256)),
    "huge":  (16, (1280, 32, 16), (640, 4, 8), (1024, 1024, 512, 256)),
}
TEACHERS = {  # DINO v1: width, depth, heads, public weights
    "vits16": (384, 12, 6, "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"),
    "vitb16": (768, 12, 12, "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
}


# ============ tubes and mask (Sec. 3.1) ============

def tube_mask(batch, frames, patches, ratio=0.9, device=None, generator=None):
    """Tube masking: hide the same patches in every frame of a clip, so that nothing can be copied through time.

    frames and patches count tubes: 8 and 196 for 16 frames of 224x224. Returns bool [batch, frames * patches],
    frames-major, True where masked; exactly int(ratio * patches) masked per frame, drawn for every clip.
    `generator` makes it repeatable (drawn on the generator's device). Raises ValueError for a ratio outside [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"mask ratio {ratio} is outside [0, 1]")
    draw = torch.rand(batch, patches, device=generator.device if generator is not None else device, generator=generator)
    rank = draw.argsort(dim=1).argsort(dim=1)                    # of each patch in a random order
    masked = (rank < int(ratio * patches)).to(device)            # [batch, patches]
    return masked.repeat(1, frames)                              # the same in every frame: a tube


@torch.compiler.disable      # its numbers are the host's: torch.compile traces around it
def split_mask(mask, device):
    """bool [B, N] -> ascending tube indices of the visible [B, n] and of the masked [B, M] tubes, on `device`.

    Index gathers keep every shape static, where boolean indexing would make the GPU report a size to the host. n
    itself has to be known to the host: for a mask on the CPU that is free, for one on the GPU it waits for the GPU.
    Raises ValueError unless every clip has the same number of masked tubes, and both kinds.
    """
    counts = mask.sum(dim=1).tolist()
    if len(set(counts)) != 1 or not 0 < counts[0] < mask.shape[1]:
        raise ValueError(f"every clip needs the same number of masked tubes, between 1 and {mask.shape[1] - 1}; the mask has {sorted(set(counts))}")
    order = mask.to(device, non_blocking=True).byte().argsort(dim=1, stable=True)   # visible (0) first, each part ascending
    return order.split([mask.shape[1] - counts[0], counts[0]], dim=1)


def take_tubes(x, index):
    """x [B, N, C], index [B, n] -> the indexed tubes [B, n, C]."""
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), index]


def patchify(video, patch):
    """[B, 3, T, H, W] -> tubes [B, N, P], P = 2 * patch * patch * 3: position-major, channel last, as the release."""
    B, C, T, H, W = video.shape
    x = video.reshape(B, C, T // TUBELET, TUBELET, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(B, -1, TUBELET * patch * patch * C)


def normalize_tubes(tubes):
    """ImageNet-normalised tubes [..., P] -> each tube and channel to mean 0, deviation 1: the target of MAE and VideoMAE.

    The release first undoes the ImageNet normalisation, x·std + mean, which standardising would cancel but for its 1e-6
    beside the deviation: here that is brought to the scale of x, and x is read half as often. Unbiased variance.
    """
    x = tubes.unflatten(-1, (-1, 3)).float()                                     # [..., positions, 3]
    x = x - x.mean(dim=-2, keepdim=True, dtype=torch.float64).float()            # float64: a tube of one colour is exactly 0
    deviation = torch.linalg.vector_norm(x, dim=-2, keepdim=True) / (x.shape[-2] - 1) ** 0.5     # torch.var takes 5 times as long on CPUs
    std = torch.stack([x.new_full((), value) for value in IMAGENET_STD])         # filled, not copied: a copy would wait for the GPU
    return (x / (deviation + 1e-6 / std)).flatten(-2)


# ============ the transformer that Ψ and the DINO teacher share ============

class Attention(torch.nn.Module):
    """Multi-head self-attention, [B, N, width] -> the same.

    key_bias=False is the video model: biases for q and v only, as BEiT and VideoMAE. A k bias adds the same number to
    all logits of a query, which softmax ignores; the DINO files have one nonetheless (key_bias=True).
    """
    plain = False     # True: in training as products: 8% of a CPU's step saved, but N x N numbers a head are kept

    def __init__(self, width, heads, key_bias=False):
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(width, 3 * width, bias=key_bias)
        if not key_bias:
            self.q_bias, self.v_bias = torch.nn.Parameter(torch.zeros(width)), torch.nn.Parameter(torch.zeros(width))
        self.proj = torch.nn.Linear(width, width)

    def forward(self, x):
        bias = self.qkv.bias
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = torch.nn.functional.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))  # [B, N, 3, heads, width/heads]
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))                          # 3 x [B, heads, N, width/heads]
        if self.plain and self.training:
            x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v   # softmax(qkᵀ/√d) v
        else:
            x = torch.nn.functional.scaled_dot_product_attention(q, k, v)             # the same, without the N x N matrix
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(torch.nn.Module):
    """Pre-norm transformer block. drop_path: probability of skipping a branch, per clip, in training (fine-tuning only)."""
    def __init__(self, width, heads, key_bias=False, drop_path=0.0):
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, key_bias)
        self.norm2 = torch.nn.LayerNorm(width, eps=1e-6)
        self.mlp = torch.nn.Sequential()
        for name, layer in (("fc1", torch.nn.Linear(width, 4 * width)), ("act", torch.nn.GELU()), ("fc2", torch.nn.Linear(4 * width, width))):
            self.mlp.add_module(name, layer)
        self.drop_path = drop_path

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, branch):
        if not self.training or self.drop_path == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1 - self.drop_path)


def sincos_table(positions, width):
    """Fixed 1-D positions [positions, width]: position / 10000^(2⌊j/2⌋/width), sine on even j, cosine on odd j."""
    j = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (j // 2) / width)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


def init_transformer(module):
    """Xavier-uniform Linear layers without bias values, as the release; LayerNorm starts at 1 and 0 by itself."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)


# ============ video model Ψ (Sec. 3.1) ============

class Encoder(torch.nn.Module):
    """ViT on the tubes it is given: tubes [B, n, P] and their positions [B, n] -> tokens [B, n, D] after the final norm."""
    def __init__(self, num_tubes, patch, width, depth, heads, drop_path=0.0):
        super().__init__()
        # Holds the weight under its released name and shape. It is applied as a matrix product to the visible tubes
        # alone: convolving the whole clip would embed ten times as many.
        self.patch_embed = torch.nn.ModuleDict({"proj": torch.nn.Conv3d(3, width, (TUBELET, patch, patch), (TUBELET, patch, patch))})
        self.blocks = torch.nn.ModuleList(Block(width, heads, drop_path=drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = torch.nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("positions", sincos_table(num_tubes, width), persistent=False)
        init_transformer(self.blocks)                                     # the patch embedding keeps PyTorch's default

    def forward(self, tubes, index):
        proj = self.patch_embed["proj"]
        weight = proj.weight.permute(0, 2, 3, 4, 1).flatten(1)            # [D, P], in the order of patchify
        x = torch.nn.functional.linear(tubes, weight, proj.bias) + self.positions[index]  # [B, n, D]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(torch.nn.Module):
    """ViT over visible tokens first, mask tokens after them: [B, N, d] -> predictions for the last M: [B, M, F]."""
    def __init__(self, num_tubes, width, depth, heads, out_width):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = torch.nn.LayerNorm(width, eps=1e-6)
        self.head = torch.nn.Linear(width, out_width)
        self.register_buffer("positions", sincos_table(num_tubes, width), persistent=False)
        init_transformer(self)

    def forward(self, x, num_masked):
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -num_masked:]))


# ============ projection network φ (Sec. 3.2) ============

def projection_mlp(in_width, widths):
    """The trained φ: Linear layers of these widths with GELU between, on one tube's normalised pixels. PyTorch's init."""
    layers = []
    for fan_in, fan_out in zip((in_width, *widths), widths):
        layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.GELU()]
    return torch.nn.Sequential(*layers[:-1])


class DinoViT(torch.nn.Module):
    """The frozen φ: a DINO v1 image ViT (Caron et al., 2021) under the parameter names of its public files.

    images, ImageNet-normalised [B, 3, H, W] with sides divisible by 16 -> patch tokens [B, H/16 * W/16, width] after
    the final norm, without the class token. The public position table is 14 x 14; another grid is interpolated to.
    """
    def __init__(self, width, depth, heads):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + 14 * 14, width))
        self.patch_embed = torch.nn.ModuleDict({"proj": torch.nn.Conv2d(3, width, 16, 16)})
        self.blocks = torch.nn.ModuleList(Block(width, heads, key_bias=True) for _ in range(depth))
        self.norm = torch.nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        x = self.patch_embed["proj"](images)                                            # [B, width, H/16, W/16]
        grid, positions = x.shape[-2:], self.pos_embed
        if grid != (14, 14):
            table = positions[:, 1:].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
            table = torch.nn.functional.interpolate(table, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
            positions = torch.cat([positions[:, :1], table], dim=1)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]


# ============ Sinkhorn (Sec. 3.3) ============

def all_reduce(x, op="SUM"):
    """In-place reduction over all ranks; x itself when there is no process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x, op=getattr(torch.distributed.ReduceOp, op))
    return x


@torch.no_grad()
def sinkhorn_scaling(scores, eps=0.05, iterations=10):
    """Sinkhorn-Knopp as two vectors: kernel [N, K] and column scale v [K]; Q is kernel * v with rows made to sum to 1.

    The textbook (and the release) scales the N x K matrix in place, columns then rows. Here the matrix stays as it is
    and only the scales u (tubes) and v (prototypes) move: the same plan, each half-iteration a product that reads the
    matrix once. Ten iterations are far from convergence, so Q depends on where they start, and the start is
    exp(scores / eps). Shifting a column changes nothing, for the first step normalises columns. A row's shift would
    change the plan, so u starts at what was taken out. With both, every row and column of the kernel has a 1 in it:
    no sum underflows, whatever the scores. Over several ranks each iteration is one all-reduce of K numbers; the two
    branches could share theirs only by keeping both kernels at once.
    """
    limit = 1e30 * eps                                                       # a finite score, divided by eps, stays finite
    kernel = scores.float().clamp(-limit, limit).div_(eps)                   # the one N x K matrix beside the scores
    column_max = kernel.amax(dim=0) if len(kernel) else kernel.new_full(kernel.shape[1:], -torch.inf)
    kernel.sub_(all_reduce(column_max, "MAX"))
    row_max = kernel.amax(dim=1)
    kernel.sub_(row_max[:, None]).exp_()
    u, v = row_max.exp(), (column_max - column_max.max()).exp()
    # A CPU's library runs one product of matrix and vector on one core, but a batch of them on several: hence blocks of rows.
    parts = next(n for n in (16, 8, 4, 2, 1) if len(kernel) % n == 0) if kernel.device.type == "cpu" else 1
    blocks = kernel.view(parts, len(kernel) // parts, kernel.shape[1])           # [parts, N/parts, K]

    def over_prototypes(v):                                                      # kernel v, [N]
        return kernel @ v if parts == 1 else torch.bmm(v.expand(parts, 1, -1), blocks.mT).flatten()

    def over_tubes(u):                                                           # kernelᵀ u, [K]
        return kernel.T @ u if parts == 1 else torch.bmm(u.view(parts, 1, -1), blocks).sum(dim=(0, 1))

    with torch.autocast("cuda" if kernel.is_cuda else "cpu", enabled=False):     # in half precision u and v would overflow
        for i in range(iterations):                                              # prototypes first, tubes second
            u = over_prototypes(v).reciprocal_() if i else u                     # rows sum to 1; the last time is the caller's
            v = all_reduce(over_tubes(u)).reciprocal_()                          # columns even over the tubes of all ranks
            v = v.div_(v.amax()).clamp_(min=1e-30)                               # a common factor is free: u takes it up
    return kernel, v


def sinkhorn(scores, eps=0.05, iterations=10):
    """Even cluster assignment: min over Q of ⟨Q, −log X⟩ + 1/λ KL(Q ‖ rcᵀ), with 1/λ = eps (Sec. 3.3).

    scores [N, K] of any floating dtype -> float32 q [N, K]: every row sums to 1, columns are even (exactly so only as
    iterations grow; the release stops at 10). Under an initialised process group the columns are even over the rows of
    all ranks, whose numbers may differ. Finite for every finite score. No gradient flows.
    """
    kernel, v = sinkhorn_scaling(scores, eps, iterations)
    q = kernel.mul_(v)
    return q.div_(q.sum(dim=1, keepdim=True))


def sinkhorn_argmax(scores, eps=0.05, iterations=10):
    """sinkhorn(...).argmax(1), int64 [N]: the hard assignment needs no row sums, hence neither u nor q."""
    kernel, v = sinkhorn_scaling(scores, eps, iterations)
    return kernel.mul_(v).argmax(dim=1)


# ============ SIGMA ============

class SIGMA(torch.nn.Module):
    """Video model Ψ, projection network φ and prototypes C, trained together (Fig. 2).

    size:   tiny | small | base | large | huge         frames, image_size: of the clips, fixed for a model
    target: mlp | dino (frozen, `teacher` vitb16 or vits16) | pixel
    loss:   sigma, or l2: pixel with l2 is VideoMAE, mlp with l2 is the collapse that motivates the paper
    assignment: hard (the release) or soft (the text)  eps: Sinkhorn's 1/λ     temperature: τ
    drop_path: largest rate of stochastic depth, for fine-tuning
    Raises ValueError, in one line, for what does not go together.

    state_dict() has the names and shapes of the authors' checkpoints; the frozen teacher is not in it.
    """
    def __init__(self, size="base", target="mlp", loss="sigma", num_prototypes=3000, eps=0.05, iterations=10, temperature=0.1,
                 assignment="hard", teacher="vitb16", frames=16, image_size=224, drop_path=0.0):
        super().__init__()
        for name, value, choices in (("size", size, SIZES), ("target", target, ("mlp", "dino", "pixel")), ("loss", loss, ("sigma", "l2")),
                                     ("assignment", assignment, ("hard", "soft")), ("teacher", teacher, TEACHERS)):
            if value not in choices:
                raise ValueError(f"{name} {value!r} is not one of: {', '.join(choices)}")
        if target == "pixel" and loss != "l2":
            raise ValueError("target pixel goes with loss l2 only (that is VideoMAE): pixels are not clustered")
        self.patch, (width, depth, heads), (dec_width, dec_depth, dec_heads), phi_widths = SIZES[size]
        if frames < TUBELET or frames % TUBELET:
            raise ValueError(f"frames is {frames}: tubes are {TUBELET} frames long, so it must be a positive multiple of {TUBELET}")
        if image_size < self.patch or image_size % self.patch:
            raise ValueError(f"image size is {image_size}: patches of {size} are {self.patch} pixels, so it must be a positive multiple of {self.patch}")
        if num_prototypes < 1 or iterations < 0 or not eps > 0 or not temperature > 0:
            raise ValueError("num_prototypes, eps and temperature must be positive, iterations not negative")
        self.size, self.target, self.loss, self.assignment = size, target, loss, assignment
        self.eps, self.iterations, self.temperature = eps, iterations, temperature
        self.frames, self.image_size = frames, image_size
        self.grid = (frames // TUBELET, image_size // self.patch, image_size // self.patch)      # tubes: time, height, width
        self.num_tubes = math.prod(self.grid)
        tube_width = TUBELET * self.patch ** 2 * 3                                               # P
        out_width = {"mlp": phi_widths[-1], "dino": TEACHERS[teacher][0], "pixel": tube_width}[target]   # F

        self.encoder = Encoder(self.num_tubes, self.patch, width, depth, heads, drop_path)
        self.encoder_to_decoder = torch.nn.Linear(width, dec_width, bias=False)
        self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, dec_width))
        self.decoder = Decoder(self.num_tubes, dec_width, dec_depth, dec_heads, out_width)
        torch.nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        if target == "mlp":
            self.head = projection_mlp(tube_width, phi_widths)
        if target == "dino":
            self.teacher = DinoViT(*TEACHERS[teacher][:3]).requires_grad_(False)
            self.teacher_url, self.teacher_checked = TEACHERS[teacher][3], False
        if loss == "sigma":
            self.prototypes = torch.nn.Parameter(torch.randn(num_prototypes, out_width))               # C

    def load_teacher(self, path=None):
        """Loads DINO's weights from a file, or from their public URL into PyTorch's cache. Frozen; not in state_dict().

        Raises ValueError for a file that is something else, OSError where the address cannot be reached.
        """
        if path is None:
            try:
                weights = torch.hub.load_state_dict_from_url(self.teacher_url, map_location="cpu", weights_only=True)
            except OSError as error:
                raise OSError(f"DINO's weights could not be downloaded ({error}): fetch {self.teacher_url} elsewhere and name the file with --dino-weights") from None
        else:
            weights = load_checkpoint(path)
        try:
            self.teacher.load_state_dict(weights)
            self.teacher_checked = True
        except RuntimeError:
            raise ValueError(f"{path or 'what came from ' + self.teacher_url}: not the weights of this DINO network; they are at {self.teacher_url}") from None

    # The teacher is frozen and public: not stored, and not missed when a checkpoint is loaded strictly.
    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        for name in [name for name in state if "teacher." in name]:
            del state[name]
        return state

    def load_state_dict(self, state, strict=True, assign=False):
        if self.target == "dino":
            state = {**state, **{f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}}
        return super().load_state_dict(state, strict, assign)

    # ---- the forward pass, a method a box of the paper's Fig. 2 ----

    def forward(self, video, mask):
        """video [B, 3, T, H, W], ImageNet-normalised; mask bool [B, N], True where masked -> scalar loss, statistics.

        The statistics are detached scalars: for loss "sigma" loss_video and loss_projection, agreement (share of tubes
        whose hard assignments agree between the branches), perplexity (how many prototypes are nearest to some φ feature,
        as exp of the entropy: 1 to K), and, for any learned or DINO target, spread (1 − ‖mean unit feature of φ‖, 0 when
        collapsed). Perplexity and spread are over all ranks. Raises ValueError for shapes the model was not built for.
        """
        shape = (3, self.frames, self.image_size, self.image_size)
        if video.ndim != 5 or video.shape[1:] != shape:
            raise ValueError(f"video has shape {tuple(video.shape)}; the model was built for (batch, {', '.join(map(str, shape))})")
        if mask.shape != (len(video), self.num_tubes):
            raise ValueError(f"mask has shape {tuple(mask.shape)}; these clips need ({len(video)}, {self.num_tubes})")
        visible, masked = split_mask(mask, video.device)                                 # [B, n], [B, M]
        tubes = patchify(video, self.patch)                                              # [B, N, P]
        x_psi = self.forward_video(take_tubes(tubes, visible), visible, masked)          # x^Ψ [B, M, F]
        x_phi = self.forward_target(video, tubes, masked)                                # x^φ [B, M, F]
        return self.forward_loss(x_psi.flatten(0, 1), x_phi.flatten(0, 1))

    def forward_video(self, tubes, visible, masked):
        """Ψ: visible tubes [B, n, P] -> x^Ψ, predicted features of the masked ones [B, M, F]."""
        return self.forward_decoder(self.encoder(tubes, visible), visible, masked)

    def forward_decoder(self, x, visible, masked):
        """The encoder's tokens of the visible tubes [B, n, D] -> x^Ψ [B, M, F]."""
        x = self.encoder_to_decoder(x) + self.decoder.positions[visible]                 # [B, n, d]
        hidden = self.mask_token + self.decoder.positions[masked]                        # [B, M, d]
        return self.decoder(torch.cat([x, hidden], dim=1), masked.shape[1])              # [B, N, d], visible ones first

    def forward_target(self, video, tubes, index):
        """φ: x^φ [B, M, F] of the indexed tubes ("inverse masking"), from the pixels of all [B, N, P] or DINO's view of the frames."""
        if self.target == "dino":
            return take_tubes(self.teacher_features(video), index)
        pixels = normalize_tubes(take_tubes(tubes, index))
        return pixels if self.target == "pixel" else self.head(pixels)

    @torch.no_grad()
    def teacher_features(self, video):
        """DINO's patch tokens [B, N, F] of the first frame of every tube, each channel normalised over the clip."""
        if not self.teacher_checked:                                                     # once: it waits for the GPU
            self.teacher_checked = True
            if not self.teacher.pos_embed.any():
                warnings.warn("DINO's weights were never loaded: the targets are those of a random network (call load_teacher)")
        frames = video[:, :, ::TUBELET].transpose(1, 2).flatten(0, 1)                    # [B*T/2, 3, H, W]
        if self.patch != 16:                                                             # DINO's patches must be Ψ's tubes
            frames = torch.nn.functional.interpolate(frames, size=tuple(16 * side for side in self.grid[1:]), mode="bilinear", align_corners=False)
        x = self.teacher(frames).float().unflatten(0, (len(video), -1)).flatten(1, 2)    # [B, N, F]
        var, mean = torch.var_mean(x, dim=1, keepdim=True)
        return (x - mean) / (var.sqrt() + 1e-6)

    def forward_loss(self, x_psi, x_phi):
        """x^Ψ, x^φ [B*M, F] -> L = 1/N Σ CE(x̃^φ/τ, q^Ψ) + CE(x̃^Ψ/τ, q^φ), or 1/N Σ ‖x^φ − x^Ψ‖² for "l2"; statistics."""
        unit_phi = torch.nn.functional.normalize(x_phi.float(), dim=-1)  # float: squares overflow in fp16
        if self.loss == "l2":
            stats = {} if self.target == "pixel" else {"spread": self.usage(unit_phi)[1]}
            return torch.nn.functional.mse_loss(x_psi.float(), x_phi.float()), stats  # mean over F too: a constant factor

        self.normalize_prototypes()
        # x̃/τ, divided while it is F numbers a tube and not K: at K = 3000 the division would cost 4% of a CPU's step.
        unit_psi = torch.nn.functional.normalize(x_psi.float(), dim=-1)
        scores_phi = (unit_phi / self.temperature @ self.prototypes.T).float()           # x̃^φ/τ [B*M, K]
        scores_psi = (unit_psi / self.temperature @ self.prototypes.detach().T).float()  # x̃^Ψ/τ: C learns from φ's term only
        assign = sinkhorn_argmax if self.assignment == "hard" else sinkhorn
        q_phi, q_psi = [assign(scores.detach(), self.eps / self.temperature, self.iterations) for scores in (scores_phi, scores_psi)]
        hard_phi, hard_psi = (q_phi, q_psi) if self.assignment == "hard" else (q_phi.argmax(dim=1), q_psi.argmax(dim=1))
        loss_projection = torch.nn.functional.cross_entropy(scores_phi, q_psi)           # each branch predicts the other's q
        loss_video = torch.nn.functional.cross_entropy(scores_psi, q_phi)
        perplexity, spread = self.usage(unit_phi, scores_phi)
        stats = {"loss_video": loss_video.detach(), "loss_projection": loss_projection.detach(),
                 "agreement": (hard_phi == hard_psi).float().mean(), "perplexity": perplexity, "spread": spread}
        return loss_video + loss_projection, stats

    @torch.compiler.disable      # DDP with torch.compile cuts the graph by the parameters' sizes, and may cut in here
    @torch.no_grad()
    def normalize_prototypes(self):
        """c on the unit sphere, in place as the release: no gradient goes through the normalisation."""
        self.prototypes.copy_(torch.nn.functional.normalize(self.prototypes, dim=-1))

    @torch.no_grad()
    def usage(self, unit_phi, scores=None):
        """Health of the targets over all ranks: perplexity of the nearest prototypes (None without scores) and spread."""
        K = 0 if scores is None else scores.shape[1]
        counts = unit_phi.new_zeros(K)
        if K:   # index_add, not bincount: that one asks the GPU for the largest index
            counts.index_add_(0, scores.argmax(dim=1), unit_phi.new_ones(len(unit_phi)))
        total = all_reduce(torch.cat([counts, unit_phi.sum(dim=0), unit_phi.new_full((1,), len(unit_phi))]))
        share, mean = total[:K] / total[-1], total[K:-1] / total[-1]
        perplexity = torch.special.entr(share).sum().exp() if K else None
        return perplexity, 1 - mean.norm()

    # ---- what a trained model is used for ----

    def features(self, video):
        """Encoder tokens [B, N, D] of the whole, unmasked clip [B, 3, T, H, W], after the final norm. Mean-pool to classify."""
        everything = torch.arange(self.num_tubes, device=video.device).expand(len(video), -1)
        return self.encoder(patchify(video, self.patch), everything)

    @torch.no_grad()
    def assign(self, video):
        """Index of the best prototype for every tube of the unmasked clip, by φ: int64 [B, N]. Needs loss "sigma"."""
        if self.loss != "sigma":
            raise ValueError("a model trained with loss l2 has no prototypes to assign to")
        everything = torch.arange(self.num_tubes, device=video.device).expand(len(video), -1)
        x_phi = self.forward_target(video, patchify(video, self.patch), everything)
        return (torch.nn.functional.normalize(x_phi.float(), dim=-1) @ torch.nn.functional.normalize(self.prototypes, dim=-1).T).argmax(dim=-1)


def load_checkpoint(path):
    """Reads a checkpoint of this project or of the authors without running anything in it: a dict on the CPU.

    The authors' files hold an argparse.Namespace, which is plain data and allowed. Raises ValueError, in one line, for a
    file that carries code, is torn, or is no checkpoint; FileNotFoundError where there is none.
    """
    try:
        torch.serialization.add_safe_globals([argparse.Namespace])        # for good: the context manager breaks loads in other threads
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(f"{path}: refused, it is no checkpoint of tensors and plain data{f' but wants to run {wanted[1]}' if wanted else ''}; nothing of it was run") from None
    except FileNotFoundError:
        raise
    except Exception as error:   # bytes that are no checkpoint end in any error
        raise ValueError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content
