"""Pixels to latents and back: scaled, shifted, with the draw of the sample's own key."""

import pytest
import torch
from helpers.support import assert_close
from helpers.tiny_networks import TINY_VAE, vae

from difftrain.core.digests import weights_digest
from difftrain.core.errors import InputError
from difftrain.core.rng import Rng
from difftrain.models.autoencoder import FRAMES_AT_ONCE, LatentEncoder

PIXELS = 2 * torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return vae(tmp_path_factory.mktemp("vae") / "model")


def draws(samples=(0, 1, 2)) -> Rng:
    return Rng(0, 5, samples, 8)


def test_the_encoder_knows_its_shapes(folder):
    encoder = LatentEncoder(str(folder))

    assert (encoder.factor, encoder.channels, encoder.pixel_channels) == (2, 4, 3)
    assert encoder.encode(PIXELS, draws()).shape == (3, 4, 4, 4)
    assert encoder.decode(torch.zeros(2, 4, 4, 4)).shape == (2, 3, 8, 8)
    assert not any(p.requires_grad for p in encoder.vae.parameters())


def test_the_shape_of_latents_is_known_without_encoding(folder):
    encoder = LatentEncoder(str(folder))

    assert encoder.latent_shape((3, 8, 8)) == (4, 4, 4)
    assert encoder.latent_shape((3, 5, 8, 6)) == (4, 5, 4, 3)
    with pytest.raises(
        InputError, match=r"1, but the encoder takes 3. Write transform: \{channels"
    ):
        encoder.latent_shape((1, 8, 8))


def test_the_identity_is_that_of_weights_and_precision(folder):
    encoder = LatentEncoder(str(folder))
    other = LatentEncoder("given", vae=built(), dtype="bfloat16")

    assert encoder.identity() == {
        "VAE": weights_digest(encoder.vae.state_dict()),
        "precision of the VAE": "float32",
    }
    assert other.identity()["precision of the VAE"] == "bfloat16"
    assert other.identity()["VAE"] != encoder.identity()["VAE"]


def test_latents_are_the_posteriors_mean_shifted_and_scaled(folder):
    plain = LatentEncoder(str(folder), sample=False)
    mean = plain.vae.encode(PIXELS).latent_dist.mean

    assert_close(
        plain.encode(PIXELS, draws()), mean * TINY_VAE.get("scaling_factor", 0.18215), absolute=1e-6
    )
    assert_close(
        LatentEncoder(str(folder), sample=False, scale=2.0).encode(PIXELS, draws()),
        mean * 2,
        absolute=1e-6,
    )


def test_a_vaes_own_shift_is_used_both_ways(folder):
    from diffusers import AutoencoderKL

    own = AutoencoderKL.from_pretrained(folder)
    own.register_to_config(shift_factor=0.5, scaling_factor=3.0)
    encoder = LatentEncoder("given", sample=False, vae=own)
    mean = own.encode(PIXELS).latent_dist.mean

    assert_close(encoder.encode(PIXELS, draws()), (mean - 0.5) * 3, absolute=1e-5)
    assert_close(encoder.decode((mean - 0.5) * 3), own.decode(mean).sample, absolute=1e-5)


def test_the_posteriors_draw_belongs_to_the_sample(folder):
    encoder = LatentEncoder(str(folder))
    together, alone = encoder.encode(PIXELS, draws()), encoder.encode(PIXELS[1:2], draws([1]))

    assert_close(alone, together[1:2], absolute=1e-5)
    assert (encoder.encode(PIXELS[1:2], draws([2])) - alone).abs().max() > 1e-3


def test_the_draw_has_the_posteriors_spread(folder):
    """4,096 draws of one posterior: their standard deviation is known to 1 %."""
    encoder = LatentEncoder(str(folder), scale=1.0)
    posterior = encoder.vae.encode(PIXELS[:1]).latent_dist
    drawn = encoder.encode(PIXELS[:1].expand(4096, -1, -1, -1), Rng(0, 0, range(4096)))

    ratio = (drawn - posterior.mean).std(0) / posterior.std[0]

    assert_close(ratio.mean(), 1.0, absolute=0.01)


def test_moments_are_the_posteriors_mean_and_spread(folder):
    encoder = LatentEncoder(str(folder))
    posterior = encoder.vae.encode(PIXELS).latent_dist
    moments = encoder.moments(PIXELS)

    assert torch.equal(moments, torch.cat([posterior.mean, posterior.std], dim=1))
    assert torch.equal(encoder.latents(moments, draws()), encoder.encode(PIXELS, draws()))
    assert torch.equal(
        LatentEncoder(str(folder), sample=False, scale=1.0).latents(moments, draws()),
        posterior.mean,
    )


def built(**config):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(**{**TINY_VAE, **config})


def test_a_vaes_statistics_by_channel_are_used_both_ways():
    mean, std = [0.5, -1.0, 2.0, 0.0], [2.0, 1.0, 0.5, 4.0]
    own = built(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    encoder = LatentEncoder("given", sample=False, vae=own)
    z = own.encode(PIXELS).latent_dist.mean
    expected = torch.stack([(z[:, c] - mean[c]) * 0.5 / std[c] for c in range(4)], dim=1)

    assert_close(encoder.encode(PIXELS, draws()), expected, absolute=1e-6)
    assert_close(encoder.decode(expected), own.decode(z).sample, absolute=1e-5)
    clip = encoder.encode(PIXELS[:, :, None], draws())
    assert_close(clip[:, :, 0], expected, absolute=1e-5)
    with pytest.raises(InputError, match=r"states only one of latents_mean and latents_std"):
        LatentEncoder("given", vae=built(latents_mean=mean))


def test_a_vae_without_quantizing_convolutions_is_taken():
    own = built(use_quant_conv=False, use_post_quant_conv=False)
    encoder = LatentEncoder("given", sample=False, scale=1.0, vae=own)

    assert torch.equal(encoder.encode(PIXELS, draws()), own.encode(PIXELS).latent_dist.mean)
    assert encoder.decode(torch.zeros(1, 4, 4, 4)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_vae_in_half_precision_gives_float32_latents(folder, dtype):
    encoder = LatentEncoder(str(folder), sample=False, dtype=dtype)
    found = encoder.encode(PIXELS, draws())

    assert next(encoder.vae.parameters()).dtype == getattr(torch, dtype)
    assert found.dtype == encoder.decode(found).dtype == torch.float32
    assert_close(
        found, LatentEncoder(str(folder), sample=False).encode(PIXELS, draws()), absolute=0.02
    )


def overflowing():
    own = built()
    own.encoder.conv_in.weight.data *= 1e6
    own.encoder.conv_in.bias.data.fill_(1e6)
    return own


def test_latents_that_overflow_are_refused_with_their_images_and_a_remedy():
    encoder = LatentEncoder("given", vae=overflowing(), dtype="float16")

    remedy = (
        r"latents of a.png, b.png are not finite with the VAE in float16.*"
        r"encoder: \{type: vae, path: given, dtype: float32\}"
    )
    with pytest.raises(InputError, match=remedy):
        encoder.moments(PIXELS[:2], ["a.png", "b.png"])
    with pytest.raises(InputError, match=r"the latents of 3 of 3 images are not finite"):
        encoder.encode(PIXELS, draws())


def test_a_broken_image_is_named_in_full_precision_too(folder):
    pixels = PIXELS.clone()
    pixels[1, 0, 0, 0] = float("nan")

    with pytest.raises(
        InputError, match=r"latents of b are not finite with the VAE in float32. Look at the images"
    ):
        LatentEncoder(str(folder)).moments(pixels, ["a", "b", "c"])


# Clips

# More frames than go through at once.
CLIPS = 2 * torch.rand(2, 3, 11, 8, 8, generator=torch.Generator().manual_seed(1)) - 1


def test_a_clips_frames_are_encoded_and_decoded_one_by_one(folder):
    encoder = LatentEncoder(str(folder), sample=False)
    latents = encoder.encode(CLIPS, draws([0, 1]))
    pixels = encoder.decode(latents)

    assert latents.shape == (2, 4, 11, 4, 4)
    assert pixels.shape == CLIPS.shape
    for f in range(11):
        assert_close(latents[:, :, f], encoder.encode(CLIPS[:, :, f], draws([0, 1])), absolute=1e-5)
        assert_close(pixels[:, :, f], encoder.decode(latents[:, :, f]), absolute=1e-5)


def test_a_clip_is_encoded_alike_whatever_is_in_the_batch(folder):
    encoder = LatentEncoder(str(folder))
    latents = encoder.encode(CLIPS, draws([5, 6]))

    assert torch.equal(encoder.encode(CLIPS[1:], draws([6])), latents[1:])
    assert torch.equal(encoder.decode(latents[1:]), encoder.decode(latents)[1:])


def test_a_long_clip_goes_through_in_bounded_pieces(folder, monkeypatch):
    encoder, sizes = LatentEncoder(str(folder)), []
    encode = encoder.vae.encode
    monkeypatch.setattr(encoder.vae, "encode", lambda x: sizes.append(len(x)) or encode(x))

    encoder.encode(CLIPS, draws([0, 1]))

    assert max(sizes) <= FRAMES_AT_ONCE < 11
    assert sum(sizes) == 22


def test_each_frame_of_a_clip_has_a_draw_of_its_own(folder):
    encoder = LatentEncoder(str(folder), scale=1.0)
    still = CLIPS[:1, :, :1].expand(-1, -1, 11, -1, -1)
    mean = encoder.vae.encode(still[:, :, 0]).latent_dist.mean[:, :, None]
    drawn = encoder.encode(still, draws([0])) - mean

    assert (drawn[:, :, 1:] - drawn[:, :, :1]).abs().amax((0, 1, 3, 4)).min() > 1e-3


# Folders


def test_a_pipelines_vae_folder_is_found(folder, tmp_path):
    (tmp_path / "vae").symlink_to(folder)
    one, other = (
        LatentEncoder(str(path)).decode(torch.ones(1, 4, 4, 4)) for path in (folder, tmp_path)
    )

    assert torch.equal(one, other)


def test_a_missing_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"encoder.path: there is no folder '\./nowhere'"):
        LatentEncoder("./nowhere")
    with pytest.raises(InputError, match=r"encoder.path: nothing can be loaded from"):
        LatentEncoder(str(tmp_path))
