"""A whole graph on a GPU that pretends to be small: 4-bit T5 with CLIP-L, LoRA, FLUX, VAE decoding of real sizes, with random weights.

    COMFYUI_PATH=... python benchmarks/small_card.py FOLDER --checkpoint FILE [--gib 8] [--offload auto] [--json FILE] [--tiny --cpu]

FOLDER: where t5_model.py's files are, or will be written. FILE is a FLUX.1 that make_checkpoint.py writes. torch reports and allows `gib`
GiB in all, so the host's memory manager decides as it would on such a card. Limit: no stage runs out of memory. Prints every stage's peak.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time

import torch
from lora import lora_tensors
from timing import GIB, Report, heading, need_gpu, on_gpu, start_host, sync

PROMPT = "a photograph of a lighthouse at dusk, waves on the rocks, a small boat with a red sail"
VAE = {
    "double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def pretend(gib: float) -> None:
    """Before the host is imported, which looks at the card's size then."""
    if not on_gpu():
        return
    card = int(gib * GIB)
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(card / total)
    torch.cuda.mem_get_info = lambda device=None: (max(card - torch.cuda.memory_reserved(device), 0), card)


def random_vae() -> object:
    """FLUX's autoencoder in the host's class."""
    import comfy.sd
    from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder

    state, g = {}, torch.Generator().manual_seed(3)
    for name, kind in (("encoder", Encoder), ("decoder", Decoder)):
        with torch.device("meta"):
            shapes = kind(**VAE).state_dict()
        for key, t in shapes.items():
            gain = t[0].numel() ** -0.5 if t.ndim > 1 else 0.0
            state[f"{name}.{key}"] = torch.randn(t.shape, generator=g) * gain + ("norm" in key and key.endswith("weight"))
    return comfy.sd.VAE(sd=state)


class Bench:
    def __init__(self, o: argparse.Namespace, report: Report):
        self.o, self.report = o, report

    def stage(self, name: str, work: object) -> object:
        """work(), its peak printed; running out of memory is a miss."""
        sync()
        if on_gpu():
            torch.cuda.reset_peak_memory_stats()
        start, out, failed = time.perf_counter(), None, 0
        try:
            out = work()
        except torch.OutOfMemoryError as error:
            failed = 1
            print(str(error).splitlines()[0])
        sync()
        peak = [f() / GIB for f in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)] if on_gpu() else [0.0, 0.0]
        self.report.rows.append({"stage": name, "allocated_gib": peak[0], "reserved_gib": peak[1]})
        print(f"{name}: {time.perf_counter() - start:.1f} s, peak {peak[0]:.2f} GiB allocated, {peak[1]:.2f} reserved", flush=True)
        self.report.check(f"{name}: out of memory", failed, 0)
        if failed:
            raise SystemExit(self.report.close())
        return out

    def text(self) -> list:
        from t5_model import CLIP, FOUR
        from tonfa.nodes.text_encoder import NunchakuTextEncoderLoaderV2

        import nodes

        (clip,) = NunchakuTextEncoderLoaderV2().load_text_encoder("flux.1", CLIP, FOUR, 512)
        return nodes.CLIPTextEncode().encode(clip, PROMPT)[0]

    def picture(self, positive: list) -> torch.Tensor:
        from tonfa.nodes.flux import NunchakuFluxDiTLoader
        from tonfa.nodes.lora import NunchakuFluxLoraLoader

        import nodes

        (model,) = NunchakuFluxDiTLoader().load_model(os.path.basename(self.o.checkpoint), cpu_offload=self.o.offload)
        params = model.model.diffusion_model.params
        positive = [
            [c[..., : params.context_in_dim], {**d, "pooled_output": d["pooled_output"][..., : params.vec_in_dim]}] for c, d in positive
        ]
        if not self.o.tiny:
            self.write_lora(model.model.diffusion_model)
            (model,) = NunchakuFluxLoraLoader().load_lora(model, "small_card.safetensors", 0.8)
        latent = {"samples": torch.zeros(1, 16, self.o.pixels // 8, self.o.pixels // 8)}
        out = nodes.common_ksampler(model, 1, self.o.steps, 1.0, "euler", "simple", positive, positive, latent)
        return out[0]["samples"]

    def write_lora(self, network: object) -> None:
        from safetensors.torch import save_file

        path = os.path.join(self.o.folder, "small_card.safetensors")
        if not os.path.exists(path):
            save_file(lora_tensors(network, 32, True, 0), path)

    def run(self) -> None:
        positive = self.stage("text encoders", self.text)
        gc.collect()  # as when the node's output is no longer needed
        latent = self.stage(f"{self.o.steps} steps with a LoRA, cpu_offload {self.o.offload}", lambda: self.picture(positive))
        gc.collect()
        image = self.stage("decoding", lambda: random_vae().decode(latent))
        self.report.check("picture not finite", int(not torch.isfinite(image).all()), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--offload", default="auto")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--json", help="also write rows and limits to this file")
    parser.add_argument("--tiny", action="store_true", help="small text encoders, no LoRA")
    parser.add_argument("--cpu", action="store_true", help="try this script out without a GPU")
    o = parser.parse_args()
    o.folder = os.path.abspath(o.folder)
    device = need_gpu(o.cpu)
    pretend(o.gib)
    report = Report(heading(start_host()), o.json)
    import folder_paths
    from t5_model import FOUR, TINY, XXL
    from t5_model import Bench as Encoders

    os.makedirs(o.folder, exist_ok=True)
    folder_paths.add_model_folder_path("text_encoders", o.folder)
    folder_paths.add_model_folder_path("loras", o.folder)
    folder_paths.add_model_folder_path("diffusion_models", os.path.dirname(os.path.abspath(o.checkpoint)))
    with torch.inference_mode():
        if not os.path.exists(os.path.join(o.folder, FOUR)):
            Encoders(o.folder, report, device).files(TINY if o.tiny else XXL)
        Bench(o, report).run()
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
