"""SIGMA: Sinkhorn-Guided Masked Video Modeling (Salehi et al., ECCV 2024, arXiv 2407.15447).

The paper's method section as code, in its order: tubes and mask, video model Ψ, projection network φ,
Sinkhorn, loss. `python sigma.py` shows in half a minute what it is about (last section).

A clip is cut into space-time tubes, 90% of them are masked. Ψ sees the visible tubes and predicts a
feature for every masked one; φ embeds those same masked tubes from the clip itself. If the two were
simply pulled together, both would agree on a constant. So both are scored against K shared prototypes,
Sinkhorn turns the scores into assignments that use all prototypes evenly, and each branch predicts
the assignment of the other:

    model = SIGMA(size="base", target="mlp")
    video = torch.randn(2, 3, 16, 224, 224)             # clips, ImageNet-normalised
    mask = tube_mask(batch=2, steps=8, patches=196)    # counted in tubes: 16 / 2, (224 / 16)²
    loss, stats = model(video, mask)
    loss.backward()

Symbols, the paper's:

    x^Ψ, x^φ   features of the masked tubes, by the video model and by the projection network
    c_k, C     prototype k of K, unit length, learned; all of them, a row each
    x̃          scores xᵀc_k of a unit-length feature, for all k
    Q, q       transport plan: how much of each tube goes to each prototype (the paper's transposed);
               a tube's row of it, scaled to sum to 1: its cluster assignment
    X          exp(x̃): the plan's cost, −log X, is low where the score is high
    c_i, r_k   the sums that Q must have: 1/N for tube i, 1/K for prototype k (c once more, as in the paper)
    u, v       a factor for every tube, one for every prototype: Q = diag(u) exp(x̃/ε) diag(v)
    ε, τ       1/λ, how far each tube is spread over the prototypes (0.05); the loss's temperature (0.1)

In shapes: B clips, T frames, H x W pixels; S tubes in a clip, V of them visible, M masked, n any;
N = B·M masked tubes in the batch; P numbers in a tube; D, d, E width of encoder, decoder, features.

Where the text is silent, or this departs from it, it follows the authors' release, whose numbers were
published: assignments are hard (argmax of q), not soft; prototypes learn from φ's term of the loss alone,
and are set to unit length in place before every forward; K is 3000, the text's best is 4000. Where it
departs from the release, the numbers are the same: Sinkhorn moves the vectors u and v over one fixed
matrix instead of rescaling it; tubes are picked by index, so that shapes are static and nothing waits
for the GPU; only visible tubes are embedded. Not the same: DINO runs under the training's autocast, and
the size `tiny` is ours.

Every function and class can be pasted, with those it calls and the constants it names, and needs only
the three imports below.
"""
import torch
import torch.nn.functional as F
from torch import nn

TUBELET = 2  # frames in a tube

# The encoder's width, depth and heads, the decoder's, and the widths of φ's layers: the last is E.
SIZES = {
    "tiny": dict(patch=8, width=128, depth=4, heads=2, decoder_width=64, decoder_depth=2, decoder_heads=1,
                 projection=(256, 64)),
    "small": dict(patch=16, width=384, depth=12, heads=6, decoder_width=192, decoder_depth=4, decoder_heads=3,
                  projection=(1024, 1024, 512, 256)),
    "base": dict(patch=16, width=768, depth=12, heads=12, decoder_width=384, decoder_depth=4, decoder_heads=6,
                 projection=(1024, 1024, 512, 256)),
    "large": dict(patch=16, width=1024, depth=24, heads=16, decoder_width=512, decoder_depth=4,
                  decoder_heads=8, projection=(1024, 1024, 512, 256)),
    "huge": dict(patch=16, width=1280, depth=32, heads=16, decoder_width=640, decoder_depth=4,
                 decoder_heads=8, projection=(1024, 1024, 512, 256)),
}
TEACHERS = {  # DINO v1; its width is E
    "vits16": dict(width=384, depth=12, heads=6),
    "vitb16": dict(width=768, depth=12, heads=12),
}

# ============ tubes and mask (Sec. 3.1) ============
def tube_mask(batch, steps, patches, ratio=0.9, device=None, generator=None):
    """Tube masking: the same patches in every frame, so that nothing can be copied through time.

    steps and patches count tubes: 8 and 196 for 16 frames of 224 x 224. Returns bool [batch, steps *
    patches], frames-major, True where masked: int(ratio * patches) of every frame, drawn for each clip.
    Keep it on the CPU: SIGMA counts it, which would wait for a GPU. `generator` makes it repeatable.
    """
    on = device if generator is None else generator.device
    # Sorting noise gives each clip a random permutation of 0 to patches - 1: the low numbers are masked.
    order = torch.rand(batch, patches, device=on, generator=generator).argsort(dim=1)
    return (order < int(ratio * patches)).to(device).repeat(1, steps)  # [B, patches] -> [B, S]


def split_mask(mask, device):
    """Mask [B, S] -> indices of the visible tubes [B, V] and of the masked ones [B, M], on `device`.

    Every clip has as many masked tubes as the next (ValueError otherwise), so the shapes are static.
    """
    counts = mask.sum(dim=1).tolist()
    if len(set(counts)) != 1 or not 0 < counts[0] < mask.shape[1]:
        raise ValueError(f"every clip needs as many masked tubes, some but not all; the mask has {counts}")
    # A stable sort of 0 (visible) and 1 (masked) keeps the tubes of each kind in their order.
    order = mask.to(device, non_blocking=True).byte().argsort(dim=1, stable=True)  # [B, S]
    return order.split([mask.shape[1] - counts[0], counts[0]], dim=1)


def take_tubes(x, index):
    """The indexed tubes of x: [B, S, ...], [B, n] -> [B, n, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def patchify(video, patch):
    """Clip [B, 3, T, H, W] -> tubes [B, S, P], P = 2·patch·patch·3: channel last, as the release."""
    B, _, T, H, W = video.shape
    x = video.reshape(B, 3, T // TUBELET, TUBELET, H // patch, patch, W // patch, patch)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)  # [B, T/2, H/patch, W/patch, 2, patch, patch, 3]
    return x.reshape(B, -1, TUBELET * patch * patch * 3)


def normalize_tubes(tubes):
    """Each tube and channel of [..., P] to mean 0 and deviation 1: VideoMAE's target.

    The release does this to pixels in [0, 1]. Standardising cancels ImageNet's normalisation, but for
    the 1e-6 beside the deviation, which is 1e-6 / 0.226 where pixels were divided by about 0.226.
    """
    x = tubes.unflatten(-1, (-1, 3)).float()  # [..., positions, 3]
    x = x - x[..., :1, :]  # now a tube of one colour is exactly 0, whatever the rounding of a mean
    std, mean = torch.std_mean(x, dim=-2, keepdim=True)  # unbiased
    return ((x - mean) / (std + 1e-6 / 0.226)).flatten(-2)


# ============ the transformer that Ψ and DINO share ============
class Attention(nn.Module):
    """Multi-head self-attention, [B, S, width] -> the same.

    Ψ has biases for q and v only, as BEiT and VideoMAE: one for k adds the same to all logits of a query,
    which softmax ignores. DINO's files have one nonetheless (key_bias=True).
    """
    def __init__(self, width, heads, key_bias=False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=key_bias)
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        bias = self.qkv.bias
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        x = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))  # [B, S, 3, heads, …]
        query, key, value = x.permute(2, 0, 3, 1, 4)  # each [B, heads, S, width / heads]
        # softmax(query keyᵀ / √(width / heads)) value
        x = F.scaled_dot_product_attention(query, key, value)  # [B, heads, S, width / heads]
        return self.proj(x.transpose(1, 2).flatten(2))  # [B, S, width]


class Block(nn.Module):
    """Pre-norm transformer block. drop_path: chance of skipping a branch, per clip, when fine-tuning."""
    def __init__(self, width, heads, key_bias=False, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, key_bias)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential()
        self.mlp.fc1 = nn.Linear(width, 4 * width)
        self.mlp.act = nn.GELU()
        self.mlp.fc2 = nn.Linear(4 * width, width)
        self.drop_path = drop_path

    def forward(self, x):
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, branch):
        if not self.training or self.drop_path == 0:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1 - self.drop_path)


def run_blocks(blocks, x, recompute=False):
    """x through all blocks. recompute: keep only each block's input and compute the rest again in the
    backward pass (activation checkpointing): less memory for a third more time, same numbers."""
    for block in blocks:
        if recompute and torch.is_grad_enabled():
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        else:
            x = block(x)
    return x


def sincos_table(count, width):
    """Fixed 1-D position table [count, width].

    position / 10000^(2⌊j/2⌋ / width) in column j: its sine where j is even, its cosine where odd.
    """
    j = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(count, dtype=torch.float64)[:, None] / 10000 ** (2 * (j // 2) / width)
    return torch.where(j % 2 == 0, angle.sin(), angle.cos()).float()


def init_linear(layer):
    """Encoder's and decoder's initialisation, as the release: weights Xavier-uniform, biases 0."""
    if isinstance(layer, nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# ============ video model Ψ (Sec. 3.1) ============
class Encoder(nn.Module):
    """ViT on the tubes it is given: tubes [B, n, P], their indices [B, n] -> tokens [B, n, D].

    Tubes are patchify's. drop_path: rate of the last block, rising to it from 0. recompute: see run_blocks.
    """
    def __init__(self, num_tubes, patch, width, depth, heads, drop_path=0.0, recompute=False):
        super().__init__()
        # A Conv3d for its weight's released name and shape; forward applies it as a matrix.
        size = (TUBELET, patch, patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, width, size, stride=size)})
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.register_buffer("positions", sincos_table(num_tubes, width), persistent=False)
        self.recompute = recompute
        self.blocks.apply(init_linear)  # the embedding keeps PyTorch's own, as in the release

    def forward(self, tubes, index):
        # Embeds the given tubes alone: convolving the clip would embed ten times as many.
        proj = self.patch_embed["proj"]
        weight = proj.weight.permute(0, 2, 3, 4, 1).flatten(1)  # [D, P], in patchify's order
        x = F.linear(tubes, weight, proj.bias) + self.positions[index]  # [B, n, D]
        return self.norm(run_blocks(self.blocks, x, self.recompute))


class Decoder(nn.Module):
    """ViT on tokens [B, S, d], those of the masked tubes last -> predictions for these: [B, M, E]."""
    def __init__(self, num_tubes, width, depth, heads, out_width, recompute=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, out_width)
        self.register_buffer("positions", sincos_table(num_tubes, width), persistent=False)
        self.recompute = recompute
        self.apply(init_linear)

    def forward(self, x, num_masked):
        x = run_blocks(self.blocks, x, self.recompute)
        return self.head(self.norm(x[:, -num_masked:]))


# ============ projection network φ (Sec. 3.2) ============
def projection_mlp(in_width, widths):
    """The φ that is trained along: Linear layers of these widths, GELU between, for one tube's pixels."""
    pairs = zip((in_width, *widths), widths)
    layers = [layer for fan_in, fan_out in pairs for layer in (nn.Linear(fan_in, fan_out), nn.GELU())]
    return nn.Sequential(*layers[:-1])


class DinoViT(nn.Module):
    """The frozen φ: DINO v1's image ViT (Caron et al., 2021), parameters named as in its public files.
    Images [B, 3, H, W], ImageNet-normalised -> patch tokens after the final norm [B, H/16 · W/16, E]."""
    def __init__(self, width, depth, heads):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + 14 * 14, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, kernel_size=16, stride=16)})
        self.blocks = nn.ModuleList(Block(width, heads, key_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        x = self.patch_embed["proj"](images)  # [B, E, H/16, W/16]
        first, rest = self.pos_embed.split([1, 14 * 14], dim=1)
        if x.shape[-2:] != (14, 14):  # DINO's positions are those of 224 pixels: stretched to others
            rest = rest.transpose(1, 2).unflatten(2, (14, 14))
            rest = F.interpolate(rest, size=x.shape[-2:], mode="bicubic").flatten(2).transpose(1, 2)
        x = x.flatten(2).transpose(1, 2) + rest  # [B, H/16 · W/16, E]
        x = torch.cat([(self.cls_token + first).expand(len(x), -1, -1), x], dim=1)
        return self.norm(run_blocks(self.blocks, x))[:, 1:]


# ============ Sinkhorn and the loss (Sec. 3.3) ============
def all_reduce(x, op="SUM"):
    """x, summed (or "MAX") over all ranks in place; x as it is where there is no process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x, op=getattr(torch.distributed.ReduceOp, op))
    return x


@torch.no_grad()
def sinkhorn(scores, eps=0.05, iterations=10):
    """Cluster assignments that use all prototypes evenly: x̃ [N, K] -> q [N, K], float32.

        min over Q [N, K] of ⟨Q, −log X⟩ + 1/λ KL(Q ‖ c rᵀ)    with row sums c_i = 1/N, column sums r_k = 1/K

    With log X = x̃ and 1/λ = ε the solution is Q = diag(u) exp(x̃/ε) diag(v), where u and v meet one
    condition after the other, from u = 1 on (Sinkhorn-Knopp):

        v_k = r_k / Σ_i u_i exp(x̃_ik/ε)        u_i = c_i / Σ_k exp(x̃_ik/ε) v_k

    q = N·Q: every row sums to 1; it is a softmax of x̃/ε + log v, and v a handicap for popular prototypes.
    The columns are even over the rows of all ranks (which may differ in number), more so with more
    iterations: the release stops at 10. 0 iterations give a plain softmax. Finite while |x̃/ε| < 1e38.
    """
    with torch.autocast("cuda" if scores.is_cuda else "cpu", enabled=False):  # u and v need float32
        kernel = scores.float() / eps  # x̃/ε [N, K], its exp further down
        if iterations == 0:
            return kernel.softmax(dim=1)
        # One shift for the whole matrix could, at a small ε, leave a tube that is far from every prototype a
        # row of zeros, and 1/0. So each column's maximum (over all ranks), then each row's, is subtracted:
        # every column and row has an exp(0) = 1 in it, and no sum below is 0. Nothing is lost: the u and v of
        # this kernel are the equations' times exp(shift_i) and exp(shift_k).
        shift_k = all_reduce(kernel.amax(dim=0), "MAX")  # [K]
        kernel.sub_(shift_k)
        shift_i = kernel.amax(dim=1)  # [N]
        kernel.sub_(shift_i[:, None]).exp_()
        u = shift_i.exp()  # the equations' u = 1, and not this kernel's: ten iterations do not forget it
        for _ in range(iterations):
            # Without r, as u makes up for a factor common to all of v; without c = 1/N, as q = N·Q.
            v = 1 / all_reduce(kernel.T @ u)  # [K]: every prototype is used as much as any other
            v = (v / v.amax()).clamp(min=1e-30)  # so u ≤ 1e30; bites at extreme x̃/ε or many iterations only
            u = 1 / (kernel @ v)  # [N]: every tube is assigned once
        return kernel.mul_(v).mul_(u[:, None])  # diag(u) exp(x̃/ε) diag(v)


def sigma_loss(x_psi, x_phi, prototypes, eps=0.05, iterations=10, temperature=0.1, assignment="hard"):
    """Each branch predicts the other's cluster assignment: x^Ψ, x^φ [N, E], C [K, E] -> loss, statistics.

        L = 1/N Σ_i [ CE(x̃_i^φ/τ, q_i^Ψ) + CE(x̃_i^Ψ/τ, q_i^φ) ]        no gradient through q

    Prototypes must have unit length. assignment: "soft" takes q, as the text does; "hard" its argmax, as the
    release: at ε = 0.05 q spreads over so many prototypes that it says little of its tube, while the argmax
    is sharp and, as v has gone into it, far more even than the nearest prototype would be.
    """
    unit_psi, unit_phi = F.normalize(x_psi.float(), dim=1), F.normalize(x_phi.float(), dim=1)
    # x̃/τ at once: x̃ itself would be one more N x K matrix (0.7 GB for 40 clips). That the prototypes learn
    # from φ's term alone is the release's choice; the text does not say.
    logits_phi = ((unit_phi / temperature) @ prototypes.T).float()  # x̃^φ/τ [N, K]
    logits_psi = ((unit_psi / temperature) @ prototypes.detach().T).float()  # x̃^Ψ/τ [N, K]

    # q^φ, q^Ψ [N, K]: from x̃/τ with ε/τ, as x̃/ε = (x̃/τ) / (ε/τ).
    q_phi = sinkhorn(logits_phi.detach(), eps / temperature, iterations)
    q_psi = sinkhorn(logits_psi.detach(), eps / temperature, iterations)
    hard_phi, hard_psi = q_phi.argmax(dim=1), q_psi.argmax(dim=1)  # [N]
    if assignment == "hard":
        q_phi, q_psi = hard_phi, hard_psi  # cross_entropy takes indices as well as distributions

    loss_projection = F.cross_entropy(logits_phi, q_psi)  # CE(x̃^φ/τ, q^Ψ)
    loss_video = F.cross_entropy(logits_psi, q_phi)  # CE(x̃^Ψ/τ, q^φ)
    return loss_video + loss_projection, {
        "loss_video": loss_video.detach(), "loss_projection": loss_projection.detach(),
        "spread": spread(unit_phi), "perplexity": perplexity(logits_phi),
        "agreement": (hard_phi == hard_psi).float().mean()}


@torch.no_grad()
def perplexity(scores):
    """How many prototypes are in use: exp(entropy) of the tubes' nearest, over all ranks. 1 to K."""
    ones = torch.ones(len(scores), device=scores.device)  # float32; no bincount, as that waits for the GPU
    used = torch.zeros(scores.shape[1], device=scores.device).index_add_(0, scores.argmax(dim=1), ones)
    used = all_reduce(used)  # tubes of every prototype [K]
    return torch.special.entr(used / used.sum()).sum().exp()


@torch.no_grad()
def spread(unit):
    """1 − ‖mean of the unit-length features [N, E] of all ranks‖: 0 where all are the same, collapsed."""
    total, count = all_reduce(unit.sum(dim=0)), all_reduce(unit.new_full((), len(unit)))
    return 1 - (total / count).norm()


# ============ SIGMA (Fig. 2) ============
class SIGMA(nn.Module):
    """Video model Ψ, projection network φ and prototypes C, trained together.

    size:   tiny | small | base | large | huge        frames, image_size: of the clips it will be given
    target: what φ is: mlp (trained along) | dino (frozen: `teacher` vitb16 or vits16) | pixel (none)
    loss:   sigma | l2: with pixel this is VideoMAE, with mlp the collapse that the paper starts from
    num_prototypes: K   eps: ε   iterations: of Sinkhorn   temperature: τ   assignment: hard | soft
    drop_path, recompute: see Encoder

    Names and shapes in state_dict() are the authors' checkpoints'. The frozen DINO is not in it and starts
    random: load its public file into model.teacher first, as train.py does. Raises ValueError, in one line.
    """
    def __init__(self, size="base", target="mlp", loss="sigma", num_prototypes=3000, eps=0.05,
                 iterations=10, temperature=0.1, assignment="hard", teacher="vitb16", frames=16,
                 image_size=224, drop_path=0.0, recompute=False):
        super().__init__()
        check_settings(size, target, loss, num_prototypes, eps, iterations, temperature, assignment, teacher,
                       frames, image_size)
        self.size, self.target, self.loss, self.assignment = size, target, loss, assignment
        self.eps, self.iterations, self.temperature = eps, iterations, temperature
        self.frames, self.image_size = frames, image_size
        sizes = SIZES[size]
        self.patch, width, phi_widths = sizes["patch"], sizes["width"], sizes["projection"]
        dec_width = sizes["decoder_width"]
        self.loss_fn = sigma_loss  # an attribute, so that it can be compiled
        # Tubes in time, height and width: 8 x 14 x 14 = 1568 for 16 frames of 224 pixels.
        side = image_size // self.patch
        self.grid, self.num_tubes = (frames // TUBELET, side, side), frames // TUBELET * side * side  # S
        tube_width = TUBELET * self.patch * self.patch * 3  # P
        out_width = {"mlp": phi_widths[-1], "dino": TEACHERS[teacher]["width"], "pixel": tube_width}[target]

        self.encoder = Encoder(self.num_tubes, self.patch, width, sizes["depth"], sizes["heads"], drop_path,
                               recompute)
        self.encoder_to_decoder = nn.Linear(width, dec_width, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dec_width))
        self.decoder = Decoder(self.num_tubes, dec_width, sizes["decoder_depth"], sizes["decoder_heads"],
                               out_width, recompute)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        if target == "mlp":
            self.head = projection_mlp(tube_width, phi_widths)  # φ
        if target == "dino":
            # φ. Frozen and public, so hidden from PyTorch: no checkpoint, optimizer or DDP has to know it.
            self.__dict__["teacher"] = DinoViT(**TEACHERS[teacher]).requires_grad_(False)
        if loss == "sigma":
            self.prototypes = nn.Parameter(torch.randn(num_prototypes, out_width))  # C [K, E]

    def forward(self, video, mask):
        """Clips [B, 3, T, H, W], ImageNet-normalised, mask bool [B, S] -> scalar loss, dict of statistics.

        Statistics are detached scalars. With loss "sigma", of this rank: loss_video and loss_projection, the
        terms of the loss (it starts near 2 ln K and may rise first: no measure of progress), and agreement,
        the share of tubes that both branches assign alike. Of all ranks: perplexity, how many prototypes φ
        uses, and, wherever φ is a network, spread: so all ranks must call it together.
        """
        given = (*video.shape[1:], *mask.shape)
        wanted = (3, self.frames, self.image_size, self.image_size, len(video), self.num_tubes)
        if given != wanted:
            raise ValueError(f"the clips' and the mask's sizes are {given}; the model was built for {wanted}")
        visible, masked = split_mask(mask, video.device)  # [B, V], [B, M]
        tubes = patchify(video, self.patch)  # [B, S, P]
        tokens = self.encoder(take_tubes(tubes, visible), visible)  # [B, V, D]
        x_psi = self.forward_decoder(tokens, visible, masked)  # x^Ψ [B, M, E]
        x_phi = self.forward_target(video, tubes, masked)  # x^φ [B, M, E]
        return self.forward_loss(x_psi.flatten(0, 1), x_phi.flatten(0, 1))

    def forward_decoder(self, x, visible, masked):
        """Ψ's second half: the encoder's tokens of the visible tubes [B, V, D] -> x^Ψ [B, M, E]."""
        x = self.encoder_to_decoder(x) + self.decoder.positions[visible]  # [B, V, d]
        # The same learned token for every masked tube; only its position says which one is asked for.
        asked = self.mask_token + self.decoder.positions[masked]  # [B, M, d]
        return self.decoder(torch.cat([x, asked], dim=1), masked.shape[1])  # [B, V + M, d] -> [B, M, E]

    def forward_target(self, video, tubes, index):
        """φ: x^φ [B, n, E] of the indexed tubes: of the masked ones in training ("inverse masking")."""
        if self.target == "dino":
            return take_tubes(self.teacher_features(video), index)
        pixels = normalize_tubes(take_tubes(tubes, index))  # [B, n, P]
        return pixels if self.target == "pixel" else self.head(pixels)

    @torch.no_grad()
    def teacher_features(self, video):
        """DINO's tokens [B, S, E] of each tube's first frame, every channel normalised over the clip."""
        frames = video[:, :, ::TUBELET].transpose(1, 2).flatten(0, 1)  # [B · T/2, 3, H, W]
        if self.patch != 16:  # DINO's patch is 16 pixels: enlarged until a tube's is
            frames = F.interpolate(frames, scale_factor=16 / self.patch, mode="bilinear")
        x = self.teacher.to(video.device)(frames).float()  # [B · T/2, patches, E]; hidden, so moved here
        x = x.unflatten(0, (len(video), -1)).flatten(1, 2)  # [B, S, E]
        std, mean = torch.std_mean(x, dim=1, keepdim=True)  # unbiased
        return (x - mean) / (std + 1e-6)

    def forward_loss(self, x_psi, x_phi):
        """x^Ψ, x^φ [N, E] -> loss, statistics."""
        if self.loss == "l2":
            # 1/N Σ_i ‖x_i^φ − x_i^Ψ‖², the mean over E too: 0 where both networks give all tubes the same.
            loss = F.mse_loss(x_psi.float(), x_phi.float())
            stats = {} if self.target == "pixel" else {"spread": spread(F.normalize(x_phi.float(), dim=1))}
            return loss, stats
        # C to unit length, in place and beside autograd, as the release.
        self.prototypes.data.copy_(F.normalize(self.prototypes.data, dim=1))
        return self.loss_fn(x_psi, x_phi, self.prototypes, self.eps, self.iterations, self.temperature,
                            self.assignment)

    def features(self, video):
        """Encoder tokens of the unmasked clip, after the final norm: [B, S, D]. Mean-pool to classify."""
        everything = torch.arange(self.num_tubes, device=video.device).expand(len(video), -1)
        return self.encoder(patchify(video, self.patch), everything)

    @torch.no_grad()
    def prototype_scores(self, video):
        """φ's scores x̃ [B, S, K] of every tube of the unmasked clip."""
        if self.loss != "sigma":
            raise ValueError("a model trained with loss l2 has no prototypes to assign to")
        everything = torch.arange(self.num_tubes, device=video.device).expand(len(video), -1)
        x_phi = self.forward_target(video, patchify(video, self.patch), everything).float()
        return F.normalize(x_phi, dim=2) @ F.normalize(self.prototypes, dim=1).T

    def assign(self, video):
        """φ's nearest prototype for every tube of the unmasked clip, int64 [B, S]."""
        return self.prototype_scores(video).argmax(dim=2)


# ============ plumbing: settings that cannot be are a ValueError; reading checkpoints ============
def check_settings(size, target, loss, num_prototypes, eps, iterations, temperature, assignment, teacher,
                   frames, image_size):
    for name, value, choices in (("size", size, SIZES), ("target", target, ("mlp", "dino", "pixel")),
                                 ("loss", loss, ("sigma", "l2")), ("teacher", teacher, TEACHERS),
                                 ("assignment", assignment, ("hard", "soft"))):
        if value not in choices:
            raise ValueError(f"{name} {value!r} is not one of: {', '.join(choices)}")
    for name, value, unit in (("frames", frames, TUBELET), ("image_size", image_size, SIZES[size]["patch"])):
        if value < unit or value % unit:
            raise ValueError(f"{name} is {value}: it must be a positive multiple of {unit}, as tubes are")
    if num_prototypes < 1 or iterations < 0 or not eps > 0 or not temperature > 0:
        raise ValueError("num_prototypes, eps and temperature must be positive, iterations not negative")
    if target == "pixel" and loss != "l2":
        raise ValueError("target pixel goes with loss l2 (that is VideoMAE): pixels are not clustered")


def load_checkpoint(path):
    """A checkpoint of this project or the authors -> dict on the CPU; nothing in the file is run.

    Raises ValueError, in one line, for a file that carries code, is torn or no checkpoint; else OSError."""
    import argparse  # the authors' files hold a Namespace, which is plain data

    # Registered for good: the context manager would break loads in other threads.
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # bytes that are no checkpoint end in any error
        wanted = str(error).partition("GLOBAL ")[2].split()  # what PyTorch refused to run, if that was it
        reason = f"it wants to run {wanted[0]}" if wanted else type(error).__name__
        raise ValueError(f"{path}: refused, it is no checkpoint of tensors and plain data ({reason}); "
                         "nothing in it was run") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


# ============ python sigma.py: the paper's argument in half a minute ============
def demonstration(steps=120, batch=32, seed=0):
    """Three models learn from the same clips; the two that reach a perfect loss are the two failures.

    A clip shows a random texture, drifting. With L2 both networks agree on a constant; with cross-prediction
    but no Sinkhorn on one prototype for all tubes; with Sinkhorn on neither, and the features stay apart.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    settings = {"L2": {"loss": "l2"}, "no Sinkhorn": {"iterations": 0}, "SIGMA": {}}
    models = {name: SIGMA("tiny", num_prototypes=32, frames=4, image_size=32, **changes)
              for name, changes in settings.items()}
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models.values()]
    textures = torch.randn(8, 3, 8, 8).tile(1, 1, 4, 4)  # [8, 3, 32, 32]: 8 x 8 pixels, repeated
    print("collapse is spread 0, or perplexity 1 (of 32); agreement by chance is 1/32")
    for step in range(1, steps + 1):
        video = torch.empty(batch, 3, 4, 32, 32)
        for clip, texture in zip(video, textures[torch.randint(8, (batch,))]):
            speed = 2 * torch.rand(2) - 1  # pixels a frame, down and right
            for t in range(4):
                clip[:, t] = texture.roll((t * speed).round().int().tolist(), dims=(1, 2))
        mask = tube_mask(batch, steps=2, patches=16, ratio=0.75)
        for (name, model), optimizer in zip(models.items(), optimizers):
            loss, stats = model(video, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 20 == 0:
                shown = [f"{key} {value:.2f}" for key, value in stats.items() if "loss" not in key]
                print(f"step {step:3}  {name:11}  loss {loss.item():.3f}", *shown, sep="   ")


if __name__ == "__main__":
    demonstration()
