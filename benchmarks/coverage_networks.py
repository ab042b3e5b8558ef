"""The architectures of `benchmarks.coverage`, by kind: a name as the command line takes it, and the shape of its input.

Weights are random. Images are small and networks shallow where the architecture has arguments for that, widths are
those of the smallest published member where they are not arguments. Networks of transformers have the head that they
are deployed with: where the last hidden state is itself an output, its width cannot be cut. A kind is what the weights
mostly are: a network of convolutions that has attention somewhere is a hybrid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["KINDS", "NETWORKS", "Network"]


@dataclass(frozen=True, slots=True)
class Network:
    """``spec`` is MODEL of the command line, ``shape`` its --shape, if the configuration's own is not wanted."""

    spec: str
    kind: str
    shape: tuple[int, ...] | None


def _read(
    kind: str, text: str, prefix: str = "", shape: tuple[int, ...] | None = None, head: str = ""
) -> Iterator[Network]:
    """One network a word; ``name@3,64,64`` has a shape of its own, ``head`` ends the name of the class."""
    for word in text.split():
        name, _, own = word.partition("@")
        if head and "architecture=" not in name:
            name += f"&architecture={name.partition('Config')[0]}{head}"
        yield Network(prefix + name, kind, tuple(int(n) for n in own.split(",")) if own else shape)


SMALL, IMAGE = (3, 64, 64), (3, 96, 96)

CONVOLUTIONAL = """
resnet10t resnet18 resnet50 seresnet18 ecaresnet26t resnetv2_50d_gn resnetv2_50x1_bit
gernet_s repvgg_a0 mobileone_s0 eca_vovnet39b ese_vovnet19b_dw dpn48b cs3darknet_s
convnext_atto convnextv2_atto inception_next_atto convmixer_768_32 edgenext_xx_small
efficientnet_b0 efficientnetv2_rw_t tf_efficientnet_cc_b0_4e mixnet_s fbnetc_100
fasternet_t0 ghostnet_050 ghostnetv2_100 hgnetv2_b0 hrnet_w18_small
inception_v4@3,128,128 lcnet_035 mambaout_femto mobilenetv2_035 mobilenetv3_small_050 mobilenetv4_conv_small nf_resnet26
eca_nfnet_l0 rdnet_tiny regnetx_002 regnety_002 repvit_m0_9 res2net50_14w_8s resnest14d rexnet_100 selecsls42
skresnet18 starnet_s050 vgg11_bn xception41 poolformer_s12 convformer_s18 focalnet_tiny_srf shvit_s1
"""

VISION_CONVOLUTIONAL = """
alexnet@3,96,96 efficientnet_b0 fcn_resnet50
googlenet@3,96,96 inception_v3@3,128,128 lraspp_mobilenet_v3_large mnasnet0_5 mobilenet_v2 mobilenet_v3_small
r2plus1d_18@3,4,32,32 r3d_18@3,4,32,32 s3d@3,16,224,224 resnet18
resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 wide_resnet50_2
"""

_VIT = "hidden_size=48&num_hidden_layers=2&num_attention_heads=3&intermediate_size=96"

VISION_ATTENTION = """
timm:vit_tiny_patch16_224?img_size=64&depth=3 timm:vit_small_patch16_18x2_224?img_size=64&depth=2
timm:vit_relpos_small_patch16_224?img_size=64&depth=2 timm:vit_srelpos_small_patch16_224?img_size=64&depth=2
timm:vit_base_patch16_rope_reg1_gap_256?img_size=64&depth=2 timm:vit_medium_patch16_gap_240?img_size=64&depth=2
timm:vit_wee_patch16_reg1_gap_256?img_size=64&depth=2 timm:vit_base_patch32_clip_224?img_size=64&depth=2
timm:beit_base_patch16_224?img_size=64&depth=2 timm:beitv2_base_patch16_224?img_size=64&depth=2
timm:cait_xxs24_224?img_size=64&depth=2 timm:convit_tiny?img_size=64&depth=3 timm:crossvit_9_240@3,240,240
timm:deit_tiny_distilled_patch16_224?img_size=64&depth=2 timm:deit3_small_patch16_224?img_size=64&depth=2
timm:eva02_tiny_patch14_224?img_size=56&depth=2&num_classes=10 timm:davit_tiny@3,64,64 timm:gcvit_xxtiny@3,224,224
timm:hiera_tiny_224?img_size=64 timm:mvitv2_tiny?img_size=64 timm:nest_tiny?img_size=64 timm:pit_ti_224?img_size=96
timm:pvt_v2_b0@3,64,64 timm:samvit_base_patch16?img_size=64&depth=2 timm:swin_tiny_patch4_window7_224?img_size=56
timm:swinv2_tiny_window8_256?img_size=64 timm:swinv2_cr_tiny_ns_224?img_size=64&window_size=2
timm:tnt_s_patch16_224?img_size=64&depth=2 timm:twins_pcpvt_small?img_size=64 timm:twins_svt_small?img_size=64
timm:volo_d1_224?img_size=64 timm:xcit_nano_12_p16_224?img_size=64&depth=2
timm:mixer_s32_224?img_size=64 timm:gmlp_ti16_224?img_size=64
timm:resmlp_12_224?img_size=64 timm:flexivit_small?img_size=60&depth=2
timm:vit_small_patch16_dinov3?img_size=64&depth=2
torchvision:vit_b_16?image_size=64 torchvision:swin_t@3,64,64 torchvision:swin_v2_t@3,64,64
torchvision:swin3d_t@3,4,64,64
diffusers:DiTTransformer2DModel?num_attention_heads=3&attention_head_dim=16&num_layers=2&sample_size=8&in_channels=4&num_embeds_ada_norm=10
"""

VISION_TRANSFORMERS = f"""
ViTConfig?{_VIT}&image_size=64
DeiTConfig?{_VIT}&image_size=64
Dinov2Config?{_VIT}&image_size=56
Dinov2WithRegistersConfig?{_VIT}&image_size=56
CLIPVisionConfig?{_VIT}&image_size=64&architecture=CLIPVisionModelWithProjection&outputs=image_embeds
BeitConfig?{_VIT}&image_size=64
SwinConfig?image_size=64&embed_dim=24&depths=[1,1,1]&num_heads=[2,3,4]&window_size=4
Swinv2Config?image_size=64&embed_dim=24&depths=[1,1,1]&num_heads=[2,3,4]&window_size=4
HieraConfig?image_size=[64,64]&embed_dim=24&depths=[1,1,1,1]&num_heads=[1,2,4,8]
PvtV2Config?image_size=64&hidden_sizes=[16,24,32,48]&num_attention_heads=[1,2,4,6]&depths=[1,1,1,1]@3,64,64
IJepaConfig?{_VIT}&image_size=64
"""

HYBRIDS = """
timm:botnet26t_256@3,256,256 timm:halonet26t@3,256,256 timm:lambda_resnet26t@3,128,128
timm:gcresnext26ts@3,64,64 timm:coat_lite_tiny?img_size=64&serial_depths=[1,1,1,1] timm:coatnet_nano_rw_224?img_size=64
timm:maxvit_pico_rw_256?img_size=64 timm:maxxvit_rmlp_nano_rw_256?img_size=64
timm:efficientformer_l1?depths=[1,1,1,2]@3,224,224 timm:efficientformerv2_s0@3,224,224 timm:efficientvit_b0@3,64,64
timm:efficientvit_m0@3,224,224 timm:edgenext_x_small?depths=[1,1,2,1]@3,64,64
timm:fastvit_sa12?layers=[1,1,1,1]@3,64,64 timm:levit_128s?depth=[1,1,1]@3,224,224 timm:mobilevit_xxs@3,64,64
timm:mobilevitv2_050@3,64,64 timm:mobilenetv4_hybrid_medium@3,64,64 timm:nextvit_small@3,64,64
timm:swiftformer_xs?layers=[1,1,1,1]@3,224,224 timm:tiny_vit_5m_224?depths=[1,1,1,1]@3,64,64
timm:visformer_tiny?img_size=64 timm:vit_small_r26_s32_224?img_size=64&depth=2 timm:caformer_s18@3,64,64
timm:repvit_m1_0@3,64,64 timm:vitamin_small_224?img_size=64 timm:efficientvim_m1@3,64,64 timm:iformer_t@3,64,64
timm:lowformer_b0@3,64,64
hf:SegformerConfig?hidden_sizes=[16,24,32,48]&num_attention_heads=[1,2,4,6]&depths=[1,1,1,1]&decoder_hidden_size=32&architecture=SegformerForSemanticSegmentation@3,64,64
hf:MobileViTConfig?hidden_sizes=[32,40,48]&num_attention_heads=2&image_size=64&architecture=MobileViTForImageClassification
hf:CvtConfig?embed_dim=[16,32,48]&num_heads=[1,2,3]&depth=[1,2,3]&architecture=CvtForImageClassification@3,64,64
hf:DPTConfig?hidden_size=48&num_hidden_layers=4&num_attention_heads=3&intermediate_size=96&image_size=64&backbone_out_indices=[0,1,2,3]&neck_hidden_sizes=[16,24,32,48]&fusion_hidden_size=32&architecture=DPTForDepthEstimation
diffusers:UNet2DModel?sample_size=16&block_out_channels=[32,64]&down_block_types=["DownBlock2D","AttnDownBlock2D"]&up_block_types=["AttnUpBlock2D","UpBlock2D"]
diffusers:UNet2DConditionModel?sample_size=16&block_out_channels=[32,64]&down_block_types=["CrossAttnDownBlock2D","DownBlock2D"]&up_block_types=["UpBlock2D","CrossAttnUpBlock2D"]&cross_attention_dim=24&attention_head_dim=8
diffusers:AutoencoderKL?sample_size=32&block_out_channels=[32,64]&down_block_types=["DownEncoderBlock2D","DownEncoderBlock2D"]&up_block_types=["UpDecoderBlock2D","UpDecoderBlock2D"]
diffusers:AutoencoderTiny?encoder_block_out_channels=[16,16]&decoder_block_out_channels=[16,16]&num_encoder_blocks=[1,1]&num_decoder_blocks=[1,1]@3,32,32
diffusers:VQModel?sample_size=32&block_out_channels=[32]
"""

_BERT = "hidden_size=48&num_hidden_layers=2&num_attention_heads=3&intermediate_size=96&vocab_size=200"
_LLAMA = f"{_BERT}&num_key_value_heads=1&max_position_embeddings=64"
_BART = "d_model=48&encoder_layers=2&decoder_layers=2&encoder_attention_heads=3&decoder_attention_heads=3&encoder_ffn_dim=96&decoder_ffn_dim=96&vocab_size=200"  # noqa: E501
_T5 = "d_model=48&d_kv=16&d_ff=96&num_layers=2&num_decoder_layers=2&num_heads=3&vocab_size=200"
_GPT = "n_embd=48&n_layer=2&n_head=3&vocab_size=200"
_W2V = "hidden_size=48&num_hidden_layers=2&num_attention_heads=3&intermediate_size=96&conv_dim=[16,16,24]&conv_kernel=[10,3,2]&conv_stride=[5,2,2]&num_conv_pos_embeddings=16&num_conv_pos_embedding_groups=4"  # noqa: E501

ENCODERS = f"""
BertConfig?{_BERT} BertConfig?{_BERT}&attn_implementation=eager BertConfig?{_BERT}&architecture=BertForMaskedLM
BertConfig?{_BERT}&architecture=BertForTokenClassification RobertaConfig?{_BERT} ErnieConfig?{_BERT}
ElectraConfig?{_BERT}&embedding_size=32 AlbertConfig?{_BERT}&embedding_size=24 CamembertConfig?{_BERT}
MobileBertConfig?{_BERT}&embedding_size=24&true_hidden_size=48&intra_bottleneck_size=48
DistilBertConfig?dim=48&n_layers=2&n_heads=3&hidden_dim=96&vocab_size=200
XLMRobertaConfig?{_BERT} MPNetConfig?{_BERT} RoFormerConfig?{_BERT}&embedding_size=48 FNetConfig?{_BERT}
ConvBertConfig?{_BERT}&embedding_size=48 DebertaConfig?{_BERT} DebertaV2Config?{_BERT} NystromformerConfig?{_BERT}
SqueezeBertConfig?{_BERT}&embedding_size=48&q_groups=3&k_groups=3&v_groups=3&intermediate_groups=3&output_groups=3
ModernBertConfig?{_BERT}&pad_token_id=0&cls_token_id=1&sep_token_id=2 EuroBertConfig?{_BERT}&pad_token_id=0
EsmConfig?{_BERT}&pad_token_id=1&mask_token_id=4 MegatronBertConfig?{_BERT}
RemBertConfig?{_BERT}&input_embedding_size=32 LayoutLMConfig?{_BERT}
NomicBertConfig?{_BERT}&architecture=NomicBertForMaskedLM
CLIPTextConfig?{_BERT}&architecture=CLIPTextModelWithProjection&outputs=text_embeds
FunnelConfig?d_model=48&block_sizes=[1,1]&block_repeats=[1,1]&n_head=3&d_head=16&d_inner=96&vocab_size=200
"""

DECODERS = f"""
GPT2Config?{_GPT}&architecture=GPT2LMHeadModel OpenAIGPTConfig?{_GPT}&architecture=OpenAIGPTLMHeadModel
GPTNeoXConfig?{_BERT} GPTJConfig?{_GPT}&rotary_dim=8
CodeGenConfig?n_embd=64&n_layer=2&n_head=4&rotary_dim=8&vocab_size=200
GPTNeoConfig?hidden_size=48&num_layers=2&num_heads=3&attention_types=[[["global","local"],1]]&vocab_size=200
OPTConfig?hidden_size=48&num_hidden_layers=2&num_attention_heads=3&ffn_dim=96&vocab_size=200&word_embed_proj_dim=48
BloomConfig?hidden_size=48&n_layer=2&n_head=3&vocab_size=200 FalconConfig?{_BERT}
LlamaConfig?{_LLAMA} LlamaConfig?{_LLAMA}&architecture=LlamaForSequenceClassification&pad_token_id=0
MistralConfig?{_LLAMA} Qwen2Config?{_LLAMA} Qwen3Config?{_LLAMA}&head_dim=16 GemmaConfig?{_LLAMA}&head_dim=16
Gemma2Config?{_LLAMA}&head_dim=16 PhiConfig?{_BERT} Phi3Config?{_LLAMA}&pad_token_id=0 Olmo2Config?{_LLAMA}
StableLmConfig?{_LLAMA} GraniteConfig?{_LLAMA} SmolLM3Config?{_LLAMA}&pad_token_id=0
"""

SEQUENCE_TO_SEQUENCE = f"""
T5Config?{_T5}&outputs=logits MT5Config?{_T5}&outputs=logits BartConfig?{_BART}&outputs=logits
PegasusConfig?{_BART}&outputs=logits MBartConfig?{_BART}&outputs=logits
MarianConfig?{_BART}&outputs=logits&pad_token_id=0&architecture=MarianMTModel
"""

AUDIO_TRANSFORMERS = f"""
Wav2Vec2Config?{_W2V} HubertConfig?{_W2V} UniSpeechConfig?{_W2V} WavLMConfig?{_W2V} SEWConfig?{_W2V}&squeeze_factor=2
Data2VecAudioConfig?{_W2V}&conv_pos_kernel_size=5
"""

AUDIO = f"""
hf:WhisperConfig?{_BART}&max_source_positions=40&max_target_positions=40&num_mel_bins=20&pad_token_id=0&architecture=WhisperForConditionalGeneration&outputs=logits
hf:ASTConfig?hidden_size=48&num_hidden_layers=2&num_attention_heads=3&intermediate_size=96&max_length=64&num_mel_bins=32&architecture=ASTForAudioClassification
hf:EncodecConfig?num_filters=8&hidden_size=32&codebook_size=32&upsampling_ratios=[4,2]@1,320
timm:sequencer2d_s?layers=[1,1,1,1]@3,112,112
benchmarks.coverage_recurrent:lstm@12,9 benchmarks.coverage_recurrent:lstm?bidirectional=True@12,9
benchmarks.coverage_recurrent:gru@12,9 benchmarks.coverage_recurrent:gru?bidirectional=True@12,9
benchmarks.coverage_recurrent:rnn@12,9 benchmarks.coverage_recurrent:attended@12,9
benchmarks.coverage_recurrent:crnn@1,16,40 benchmarks.coverage_recurrent:tcn@9,40
benchmarks.coverage_recurrent:m5@1,1000 benchmarks.coverage_recurrent:transformer@12,9
benchmarks.coverage_recurrent:conformer@12,9 benchmarks.coverage_recurrent:deepspeech@12,9
"""

DETECTION = """
ultralytics:yolo11n ultralytics:yolo11n-seg ultralytics:yolo11n-pose ultralytics:yolo11n-obb ultralytics:yolo11n-cls
ultralytics:yolov8n ultralytics:yolov8n-seg ultralytics:yolov8n-ghost ultralytics:yolov5n ultralytics:yolov6n
ultralytics:yolov9t ultralytics:yolov10n ultralytics:yolo12n ultralytics:yolo26n ultralytics:yolov3-tiny
"""

NETWORKS: tuple[Network, ...] = (
    *_read("convolutional", CONVOLUTIONAL, "timm:", SMALL),
    *_read("convolutional", VISION_CONVOLUTIONAL, "torchvision:", SMALL),
    *_read("vision attention", VISION_ATTENTION),
    *_read("vision attention", VISION_TRANSFORMERS, "hf:", head="ForImageClassification"),
    *_read("hybrid", HYBRIDS),
    *_read("text", ENCODERS, "hf:", head="ForSequenceClassification"),
    *_read("text", DECODERS, "hf:", head="ForCausalLM"),
    *_read("text", SEQUENCE_TO_SEQUENCE, "hf:", head="ForConditionalGeneration"),
    *_read("recurrent and audio", AUDIO_TRANSFORMERS, "hf:", (1600,), head="ForCTC"),
    *_read("recurrent and audio", AUDIO),
    *_read("detection", DETECTION, shape=IMAGE),
)
KINDS = tuple(dict.fromkeys(network.kind for network in NETWORKS))
