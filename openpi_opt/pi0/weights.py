"""to be shaped"""
import torch, math
import hashlib
from openpi_opt.pi0.policy import Pi0Policy
def build(config, device, steps=10):
    with torch.device("meta"):
        policy = Pi0Policy(config, steps)
    policy.to_empty(device=device)
    policy.requires_grad_(False)
    policy.fill_buffers()
    return policy.eval()

G = dict(vq=1.5, vv=1.0, vo=2.0, v1=0.7, v2=1.0, vb=-2, pos=1.0, patch=1.0, lq=1.5, lk=1.5, lv=1.0, lo=2.0, lg=.7, lb=-2, lu=1.0, ld=1.0,
         eq=1.5, ek=1.5, ev=1.0, eo=2.0, eg=.7, eb=-2, eu=1.0, ed=1.0, norm=0.3, out=1.0, state=1.0, action=1.0, time=1.0,
         text=3.0, vt=2.0, lt=2.0, vbeta=2.7, every=16, act=2.0, st=4.5, const=2.0)

def gen(policy, seed, name):
    h = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(policy.device).manual_seed(int.from_bytes(h[:7], "big"))
C=slice(0,None,16); T=slice(8,None,16)
def fill(name, p, c, g):
    fan = math.prod(p.shape[1:]) if p.ndim > 1 else 1
    lin = fan ** -0.5
    vd, ld = (2 * c.vision.depth) ** -0.5, (2 * c.language.depth) ** -0.5
    N=lambda m,s: p.normal_(m,s,generator=g)
    if "vision_tower" in name:
        if "layer_norm" in name or "layernorm" in name:
            return N(1.0, 0.2) if name.endswith("weight") else N(0.0, 0.1)
        if "patch_embedding.weight" in name: return N(0, G["patch"] * 3**.5 *lin)
        D=c.vision.head_dim; m=D//4; t=(D**.5/m)**.5; W=c.vision.width
        if "q_proj.bias" in name:
            N(0,.2); p.view(-1,D)[:,:m]=1.5*t; return
        if "k_proj.weight" in name:
            N(0,G["vq"]*lin); p[:,T]=0
            p.view(-1,D,W)[:,:m,T]=t/1.5*G["vbeta"]/2*1.2/(len(range(8,W,16))*2); return
        if "v_proj.weight" in name:
            N(0,G["vv"]*lin); p[:,T]*=G["vt"]; return
        if "q_proj.weight" in name or "fc1.weight" in name:
            N(0,G["vq" if "q_proj" in name else "v1"]*lin); p[:,T]=0; return
        if "out_proj" in name or "fc2" in name:
            if name.endswith("bias"): N(0,.2)
            elif "out" in name: N(0,G["vo"]*lin*vd)
            else:
                N(0, G["v2"]/.052 * lin * vd)
                p[:,1::2] = -p[:,0::2]
            p[T]=0; return
        if "position" in name:
            N(0,G["pos"]); p[:,T]=-2; p[::G["every"],T]=2; return
        if "patch_embedding" in name:
            N(0, G["patch"] * 3**.5 *lin if "weight" in name else .2); p[T]=0; return
        if "fc1.bias" in name: return N(G["vb"], .2)
        if name.endswith("bias"): return N(0, 0.2)
        if "position" in name: return N(0, G["pos"])
        if "q_proj" in name or "k_proj" in name: return N(0, G["vq"] * lin)
        if "v_proj" in name: return N(0, G["vv"] * lin)
        if "out_proj" in name: return N(0, G["vo"] * lin * vd)
        if "fc1" in name: return N(0, G["v1"] * lin)
        if "fc2" in name:
            N(0, G["v2"]/.052 * lin * vd)
            p[:,1::2] = -p[:,0::2]
            return
    if "norm" in name: return N(0.0, G["norm"])
    if "projector" in name or "state_proj" in name or "mlp_out" in name:
        if name.endswith("bias"):
            N(0,.2); p[C]=G["const"]; p[T]=-G["const"] if "state" in name else G["const"]
        else:
            N(0, lin*(G["state"] if "state" in name else 1)); p[C]=0; p[T]=0
        return
    if name.endswith("bias"): return N(0, 0.2)
    if "paligemma.lm_head" in name:
        N(0, lin); p[:,C]=G["const"]*lin; p[:,T]=-G["const"]*lin; return
    if "gemma_expert.lm" in name: return N(0,lin)
    if "action_out" in name: return N(0, G["out"]*lin)
    if "action_in_proj" in name: return N(0, G["action"]*lin)
    if "mlp_in" in name:
        N(0, lin*2**.5); p[:,p.shape[1]//2:]*=G["time"]; return
    e = "gemma_expert" in name
    x = "e" if e else "l"
    if "o_proj" in name or "down" in name:
        N(0, lin*ld*(G[x+"o"] if "o_proj" in name else G[x+"d"]/.079)); p[C]=0; p[T]=0; return
    for k, gg in (("q_proj","q"),("k_proj","k"),("v_proj","v"),("gate","g"),("up_proj","u")):
        if k in name: N(0, G[x+gg]*lin)
    p[:,C]=0
    if "v_proj" in name: p[:,T]*=G["lt"]
    else: p[:,T]=0
    one = 1.2/(len(range(0,p.shape[1],16))*G["const"])   # summed over the channels: 1
    if "gate" in name: p[:,C]=G[x+"b"]*one
    if "q_proj" in name or "k_proj" in name:
        D=c.language.head_dim; m=D//8; t=(D**.5/m)**.5
        rows=p.view(-1,D,p.shape[1])[:,3*D//8:D//2]
        if "q_proj" in name: rows[:,:,C]=1.5*t*one
        else:
            pos,neg = (G["act"],G["st"]) if e else (0,G["text"])
            rows[:,:,C]=t/1.5*(pos+neg)/2*one; rows[:,:,T]=t/1.5*(pos-neg)/2*one

def init_random(policy, seed):
    for name, p in policy.named_parameters():
        fill(name,p,policy.config, gen(policy, seed, name))
