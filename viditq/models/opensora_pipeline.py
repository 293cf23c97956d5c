"""Text to video with Open-Sora v1.0: T5, STDiT, and an image VAE frame by frame.

Legend: B prompts, L tokens, D text channels, c latent channels, T frames, h, w latent size.
"""

from typing import Any

import torch
from diffusers import LattePipeline
from diffusers.pipelines.latte.pipeline_latte import LattePipelineOutput
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor

from viditq.errors import UserError
from viditq.models.samplers import guide, is_sampler, make_sampler, set_steps, takes_variance
from viditq.models.stdit import STDiT


class OpenSoraPipeline(LattePipeline):
    """Latte's parts, text cleaning and decoding; Open-Sora's captions without padding, null caption and sampling."""

    scheduler: Any

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: STDiT, scheduler: Any) -> None:
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler)

    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | None = None,
        clean_caption: bool = True,
        max_sequence_length: int = 120,
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings [B, L, D] without padding, and where they differ in length the mask [B, L] of their tokens.

        clean_caption: clean the text as the original does (needs beautifulsoup4 and ftfy, else UserError).
        """
        if self.text_encoder is None:
            raise ValueError("this pipeline holds no text encoder; pass prompt_embeds")
        if clean_caption and not (is_bs4_available() and is_ftfy_available()):
            raise UserError(
                "Cleaning captions as Open-Sora does needs two packages: pip install beautifulsoup4 ftfy. Or leave the "
                "text as it is but for lower case: model.encode.clean_caption=false."
            )
        device = device or self._execution_device
        text = self.tokenizer(
            self._text_preprocessing(prompt, clean_caption=clean_caption),
            padding="max_length",
            max_length=max_sequence_length,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        mask_BL = text["attention_mask"]
        embeds_BLD = self.text_encoder(text["input_ids"], attention_mask=mask_BL)[0]
        lengths = mask_BL.sum(dim=1)
        longest = int(lengths.max())
        padded = bool((lengths < longest).any())
        return embeds_BLD[:, :longest], mask_BL[:, :longest] if padded else None

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.0,
        height: int = 512,
        width: int = 512,
        num_frames: int = 16,
        sampler: str | None = None,
        guidance_channels: int | None = 3,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        clean_caption: bool = True,
        max_sequence_length: int = 120,
        decode_chunk_size: int = 16,
    ) -> Any:
        """One clip of [T, 3, H, W] per prompt, as `output_type` (pil, np, pt) says, or latents [B, c, T, h, w].

        Guidance leads away from the learned null caption, or from negative_prompt_embeds. sampler: ancestral, ddim or
        dpm_solver (None: the pipeline's own scheduler). guidance_channels: guide only the first latent channels, as
        the original does (None: all). Raises ValueError for sizes or arguments that do not fit.
        """
        if negative_prompt is not None:
            raise ValueError("Open-Sora v1.0 guides by its learned null caption; pass no negative_prompt")
        self.check_inputs(prompt, height, width, None, None, prompt_embeds, negative_prompt_embeds)
        self._guidance_scale = guidance_scale
        if sampler is not None and not is_sampler(self.scheduler, sampler):
            self.scheduler = make_sampler(sampler)
        device = self._execution_device
        if prompt_embeds is None:
            assert prompt is not None, "check_inputs wants one of the two"
            prompt_embeds, prompt_attention_mask = self.encode_prompt(
                prompt, device, clean_caption, max_sequence_length
            )
        prompt_embeds = prompt_embeds.to(self.transformer.dtype)
        count, channels = len(prompt_embeds), self.transformer.config.in_channels
        if self.do_classifier_free_guidance:
            null = self._null_embeds(prompt_embeds) if negative_prompt_embeds is None else negative_prompt_embeds
            prompt_embeds = torch.cat([null, prompt_embeds])
            if prompt_attention_mask is not None:
                prompt_attention_mask = prompt_attention_mask.repeat(2, 1)
        latents = self.prepare_latents(
            count, channels, num_frames, height, width, prompt_embeds.dtype, device, generator, latents
        )
        set_steps(self.scheduler, num_inference_steps, device)
        latents = self._denoise(
            latents, prompt_embeds, prompt_attention_mask, guidance_scale, guidance_channels, generator
        )
        video = latents
        if output_type != "latent":
            frames = self.decode_latents(latents, num_frames, decode_chunk_size=decode_chunk_size)
            video = self.video_processor.postprocess_video(video=frames, output_type=output_type)
        self.maybe_free_model_hooks()
        return LattePipelineOutput(frames=video) if return_dict else (video,)

    def _null_embeds(self, prompt_embeds_BLD: Tensor) -> Tensor:
        """The null caption, cut to the prompts' length."""
        length = prompt_embeds_BLD.shape[1]
        null_1LD = self.transformer.null_caption[:, :length].to(prompt_embeds_BLD)
        if null_1LD.shape[1] < length:
            raise ValueError(f"prompts of {length} tokens; the null caption has {null_1LD.shape[1]}")
        return null_1LD.expand_as(prompt_embeds_BLD)

    def _denoise(
        self,
        latents: Tensor,
        embeds_BLD: Tensor,
        mask_BL: Tensor | None,
        guidance_scale: float,
        guidance_channels: int | None,
        generator: Any,
    ) -> Tensor:
        extra = self.prepare_extra_step_kwargs(generator, eta=0.0)
        guided, with_variance = self.do_classifier_free_guidance, takes_variance(self.scheduler)
        for step in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, step)
            output = self.transformer(
                hidden_states=model_input,
                encoder_hidden_states=embeds_BLD,
                timestep=step.to(latents.device).expand(len(model_input)),
                encoder_attention_mask=mask_BL,
                return_dict=False,
            )[0]
            if guided:
                output = guide(output, guidance_scale, guidance_channels)
            if not with_variance:
                output = output[:, : latents.shape[1]]
            latents = self.scheduler.step(output, step, latents, **extra, return_dict=False)[0]
        return latents
