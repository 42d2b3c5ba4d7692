"""The models of the timm table: one or more of each family of timm, the smaller ones."""

MODELS = tuple(
    """
    test_byobnet test_convnext test_convnext2 test_convnext3 test_efficientnet test_efficientnet_evos test_efficientnet_gn
    test_efficientnet_ln test_mambaout test_nfnet test_resnet test_vit test_vit2 test_vit3 test_vit4

    lcnet_035 lcnet_050 lcnetv2_small starnet_s050 starnet_s100 mobilenetv2_035 mobilenetv2_050 mobilenetv3_small_050 mobilenetv3_large_100
    tf_mobilenetv3_small_075 tf_mobilenetv3_small_minimal_100 mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium mnasnet_small
    dla46x_c dla46_c dla60x_c ghostnet_050 ghostnetv3_050 ghostnet_100 repghostnet_050 mobilevit_xxs mobilevitv2_050 edgenext_xx_small
    ese_vovnet19b_slim_dw ese_vovnet19b_dw convnext_zepto_rms convnext_atto_ols convnextv2_atto convnext_tiny efficientvit_b0 efficientvit_m0
    regnetx_002 regnety_002 regnetz_005 regnetv_040 cspnext_tiny fasternet_t0 iformer_t cs3darknet_s cs3darknet_focus_s cspresnet50
    swiftformer_xs efficientformerv2_s0 efficientformer_l1 fastvit_t8 pvt_v2_b0 rexnet_100 rexnetr_100 hardcorenas_a hgnetv2_b0

    efficientnet_b0 efficientnet_lite0 efficientnet_es efficientnetv2_rw_t tf_efficientnet_b0 tf_efficientnetv2_b0 mixnet_s tf_mixnet_s
    tinynet_e fbnetc_100 spnasnet_100 semnasnet_075 mnasnet_100 efficientnet_cc_b0_4e efficientnet_cc_b0_8e gc_efficientnetv2_rw_t

    resnet10t resnet18 resnet14t seresnet18 ecaresnet26t resnetblur18 resnetaa34d resnetrs50 resnext26ts gcresnext26ts seresnext26t_32x4d
    resnetv2_18 resnetv2_50 resnetv2_50x1_bit nf_regnet_b0 nf_resnet26 nf_ecaresnet26 nf_seresnet26 eca_nfnet_l0 nfnet_l0 dm_nfnet_f0
    legacy_seresnet18 legacy_seresnext26_32x4d skresnet18 resnest14d res2net50_14w_8s res2next50 selecsls42 hrnet_w18_small wide_resnet50_2
    densenet121 densenetblur121d dpn48b dpn68 vgg11 vgg11_bn inception_v3 inception_v4 legacy_xception xception41 inception_next_atto tresnet_m
    repvit_m1 repvgg_a0 mobileone_s0 gernet_s resnet32ts resnet33ts eca_resnet33ts gcresnet33ts

    halonet_h1 eca_botnext26ts_256 eca_halonext26ts lambda_resnet26t lambda_resnet26rpt_256 bat_resnext26ts sehalonet33ts
    coat_tiny coat_lite_tiny coatnet_pico_rw_224 coatnext_nano_rw_224 maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256 maxxvit_rmlp_nano_rw_256
    cait_xxs24_224 convit_tiny convmixer_768_32 crossvit_tiny_240 crossvit_9_240 cpubone_nano csatv2 davit_tiny
    vit_tiny_patch16_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 vit_relpos_small_patch16_224
    vit_srelpos_small_patch16_224 vit_tiny_r_s16_p8_224 vit_small_r26_s32_224 flexivit_small vit_xsmall_patch16_clip_224 vit_small_resnet26d_224
    eva02_tiny_patch14_224 beit_base_patch16_224 efficientvim_m1 focalnet_tiny_srf gcvit_xxtiny gmixer_12_224 gmlp_ti16_224 resmlp_12_224
    mixer_s16_224 hiera_tiny_224 hieradet_small levit_128s levit_conv_128s lowformer_b0 mambaout_femto poolformer_s12 poolformerv2_s12
    caformer_s18 convformer_s18 mvitv2_tiny nest_tiny nextvit_small pit_ti_224 pit_ti_distilled_224 sequencer2d_s shvit_s1 rdnet_tiny
    swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224
    twins_pcpvt_small twins_svt_small visformer_tiny volo_d1_224 xcit_nano_12_p16_224 xcit_tiny_12_p8_224
    """.split()
)
