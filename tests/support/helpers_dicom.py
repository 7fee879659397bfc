"""Tiny DICOM files for tests: any bits, sign, transfer syntax, orientation and intercept, and ways
to damage them.
"""

import base64
import io
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import CTImageStorage
from rle.utils import encode_pixel_data

from pipeline.slices.sources import SeriesTask, look_at

SYNTAXES = {
    "explicit": "1.2.840.10008.1.2.1",
    "implicit": "1.2.840.10008.1.2",
    "deflated": "1.2.840.10008.1.2.1.99",
    "big": "1.2.840.10008.1.2.2",
    "rle": "1.2.840.10008.1.2.5",
    "j2k": "1.2.840.10008.1.2.4.90",
    "jpegls": "1.2.840.10008.1.2.4.80",
    "jpeg": "1.2.840.10008.1.2.4.70",
}
NO_NAME = "Surname^Never^Seen"


def fingerprints(tasks: list[SeriesTask], data: Path) -> list[str]:
    """Of every series' input files."""
    return [one.fingerprint for one in look_at(tasks, data)]


def pattern(bits: int) -> np.ndarray:
    """A picture of all kinds of `bits`-bit words, (32, 33) uint16: extremes, smooth values about
    the sign change, and noise.
    """
    k = np.arange(32 * 33, dtype=np.int64).reshape(32, 33)
    words = (k * k * 2654435761 + k * 40503) >> 7
    words[:27] = (1 << (bits - 1)) - 350 + k[:27] * 3 // 4
    words[0, :4] = 0, (1 << bits) - 1, (1 << (bits - 1)) - 1, 1 << (bits - 1)
    return (words & ((1 << bits) - 1)).astype("<u2")


# `pattern(bits)` as JPEG-LS (CharLS) and as JPEG lossless, process 14 (liblj92): nothing we depend
# on encodes these.
STREAMS = {
    ("jpegls", 8): (
        "|JeWN03cIPNk&Eh0ssI30000W0000X3J3-P0003j0003j|L6b+00001|JeWc01F5JAOIl&0TBTI+5iXv0RR910H6Q>5A*@z1Q;-2h8SRm7{W1(BN)Olj3XHU00DCV00D"
        "N;0DYvDU4Q=o2LFHmf5?abfB$^0|9}5~qF?`i|9a2=fB$@{|9}5~sz3jK|6;>R%WuE`f0uv+|9}5~%5VRF|9X@EfB$~4|9}5~(SQGc|78dNfB${^|9}5}uK$1kfBgS{|"
        "9{V4^#6bVc_;sA@Be?S|9}5~{lEWz|8uARfB${U|9}5}uK$1kfAar-|9{90fB*n(KmY(>zyJVKzyJV8Lx3az00rOx00yW400(#g00+PT00#5`00t}o00n3{pfms;0009"
        ">000B500TlW0096%LZe`80k8l79N+*R01XDmpa1|c58wa*FW>+GEFb^?Fa<CG03VP502kr`VmJT*1;hXV2fzRT3;+NF0ssI506z=lPyhfI*WC<Y001x`001y&Vi^#5K~"
        "Dex0f2Z5KmY(=Lw88h{z7wNz5oCN00002{r~_2PDV4Y(iKYB??3<mTg$?;{le#m8`uB<3;+NC3<c>Cg0)d*G2<;hCkYR`O)@qR000&I000IA000Ig000IAVsK2qzmg?@"
        "003IR003ZLZ1Q>jy?_7!yFY*c0Kh!}006*@4{(GsSLHAO02l%Q000aN$q;dOsz7u%YybcOnsSdW@1XzL"
    ),
    ("jpeg", 8): (
        "|JeV;0384U0RaF50RaI400000000042L%QQ0RRI63ID?Y3kU!p03iVY5di<%00;p900sa6>;C|M`u_mzlka`^?|t|0efRHu_wRl8?|t|0efOPodw-8}rnRhVTE?}kYg)"
        "#&tZQ1vwXE4|Sk|?TYgpE`jcZuewT)|7*0qh<YZ}(Et!o<Av8`(w*0HT?8rHF`*<)JPHLYV>)-|nTTGlnKV_McVt=MZ?#<i?#TE?}kYg)#&tZQ1vwXE4|Sk|?TYgpE`j"
        "cZuewT)|7*0qh<YZ}(Et!o<Av8`(w*0HT?8rHF`*<)JPHLYV>)-|nTTGlnKV_McVy$tBQG8qho!y%B!TrwF9g~K6`$XqfR428oXkjPvz84QKPA&}0-Y_+UwTE?}kYg)#"
        "&tZQ1vwXADe#_Y9?YgpE`jcZuewT)|7*0qgmSk~;Zt!o<Av8`(w*0HT?8rHF`YZ}(<HLYV>)-|nTTGlnKV_McVtz%l&Y_+UwTE?}kYg)#&tZQ1vwXADe#_Y9?YgpE`jc"
        "ZuewT)|7*0qgmSk~;Zt!o<Av8`(w*0HT?8rHF`YZ}(<HLYV>)-|nTTGlnKV_McVtz%l&Y_+UwTE?}kYg)#&tZQ1vwXADe#_Y9?YgpE`oeYLUA#liKG8YVnLm_a;WHJ{F"
        "hC?B6$Y(|&aL8mb7Yv3&A#l#dwT)|7*0qgmSk|?TYjzsev8`(w*0HT?8rHF`YZ}(Et!p+~)-|nTTGlnKV_McVtz%l&HLYWITE?}kYg)#&tZQ1vwXADe#<i?#c39T6jcZ"
        "uewT)|7*0qgmSk|?TYjzsev8`(w*0HT?8rHF`YZ}(Et!p+~)-|nTTGlnKV_McVtz%l&HLYV|e21HJ?wiT`5yzy~IFB}^^;3xODK+<l!MVRyh4=HH#U<Cd&s%jlcMp?6y"
        "3PKha&CgzI3$m-xO@w=pWY8}x<S|;KfpUf_a2`|uiSQd9lmkN-QV-$UApMi=ZwyKGJY>Mi{1FIZMrFT;=Q%h9}=1NOgu-nT@bkO34dfa_;+ji8*bsft!`fomG&<ygvy~"
        "-t`R7M+IT#hu=u<hO$4)d7m|Lsd>gc%))xVgb_W7~+7CGV{yl!<v(C=`d~$c$zt4?MyEFLlj@<NO@x|ug|Je"
    ),
    ("jpegls", 12): (
        "|JeWc01FHNAOIl&0TBTI+5iXv0RR910H6Q>000mFAOl=L2nGRwU<d{S0f0bYFc<^|0|9`6fq{U5fq{U5fq?)30013x000009d?BSd?-*LK!OM$gdl<tgd!mbh(aP9q9P"
        "JRNf9JOkrG5n5hOw7BuYg|QdE^CNm6bWRh4B~R#lZ{SxyqHt9I?%@4t87efQse@OFFezWeXKm3QBL_uqZDUw!|7|9waQfB%2}6yN`U|9|->|9}5~{@MS3|9}5cfB%2~f"
        "8jy@fB%2~Uw{99|9|aY|9}5~|4;va|9|{?|9}5~|8773fB$Na|9}5~Z~uS)e02YR|9`oE|9}5f-~WIAeqaB8|9F4^000a6fB+r{zyNI@2mk;80N`){0002}xH!N7002~"
        "E5+VQqAH#VTlmGw#0C<$X%YkCG7_?3vIk=L9U_z)ChU8;psO3Na06;dDoB#j-032Qb0000QfB*mh02+Y+0000R;}&cH0001L000000BQWf)=B^X001=t00000HyUT~00"
        "001rxk}pX`sLW51;@500SN%00003P$N}L8K2D!e}Di000@8p0009|>VF_Gu3PO-{<Hu900uW29?ST;Vxf_MLgsz|0000Qfm7*y*4akQ1^@s605t+|!OVn*Q_dJFC;$!M"
        "0000E27~2--aYkMngjp<003$L00000Y5Yt;IXjxDLYY};00000)CuI2_NXHhL;wH)00FGx!6&c)0002g2-1@6P-=fvPyhe|zyJUM0Mqra6dXwGQm6Z|AAkS=007hY^c;"
        "mxAOHXW15f|}PHwe9DiKd5^;)IzQ~97496FO9RPTk#jzls#Dir`7G~3q_r_(-~3A9azQ@Wm29gIK#000J`fdAP"
    ),
    ("jpeg", 12): (
        "|JeV;03HAV0RRF50s{a500000000043k(Gc0SN#H2o3+k01FHNAOIl&01*KH+5iXv000I60LT9T&;J0&{{ZjBC%yOIz4za}_uswu-@W(Wz4za}_ua0r*SW9#Ui);`wT)"
        "|7*0qgmSk|?TYgpE`o0heWYgpE`jcZuewT)|7*0qgmSl!E5*0qgmSk|?TYgpE`jcZuewT*7&jcZuewT)|7*0qgmSk|?TYgpE|aMrbrYgpE`jcZuewT)|7*0qgmS-ERi*"
        "0qgmSk|?TYgpE`jcZuewT;}hjcZuewT)|7*0qgmSk|?TYgpFqSk|?TYgpE`jcZuewT)|7*0qgmcMWS;*0qgmSk|?TYgpE`jcZuewVRf;jcZuewT)|7*0qgmSk|?TYgpa"
        "OSk|?TYgpE`jcZuewT)|7*0qgp<&A4t*0qgmSk|?TYgpE`jcZuew{X_AjcZuewT)|7*0qgmSk|?TYgxH#Sk|?TYgpE`jcZuewT)|7*0qh?wT)|7*0qgmSk|?TYgpE`jc"
        "Zue?pW5fjcZuewT)|7*0qgmSk|?TYj+K6Sk|?TYgpE`jcZuewT)|7*0r0KwT)|7*0qgmSk|?TYgpE`jcZul%UIU6jcZuewT)|7*0qgmSk|?TZsm<@Sk|?TYgpE`jcZue"
        "wT)|7*0*rhwT)|7*0qgmSk|?TYgpE`jcZxCYgpE`jcZuewT)|7*0qgmSk|?T+_jBsSk|?TYgpE`jcZuewT)|7*6vu=wT)|7*0qgmSk|?TYgpE`jca!eYgpE`jcZuewT)"
        "|7*0qgmSk|?hmbHy*Sk|?TYgpE`jcZuewT)|7+6GaFo41$m4)SNJMmYAH;x7s_^~j6hDQPGHe9!UcfO(@`-cwYw#lPcw!oE_MZ<*D8vFm<R*2g~{nxOJ#zBdwCLf?~$B"
        "&hNMc(Kb1Ad`$1R~N`!XeI%W!N&q*5Pz=zS^ogp{y(!_$i478mihO0!QTgLkI&9p=XDXQJkMt&>%_)i#tOZy_zT6`8&-zVl()8Gwhg8@pXxe!)B0z^N<KGI;bS2TcM53"
        "8zVaVOq@8;HA+l}0cM{1)U$cs4Rbu$HOD7<&j8wW{k&99KVIMU9Za*@7h<-e|X#W6d`~ppvBNxFO;UUN89&~viUKq0Qut+TfJ_w)VPxJo(iv6%N2k>8Uw|`Lg%<qrB3z"
        "56H-v_wuW1UiFKQ~$7aUqO%dTeDJ0RPz"
    ),
    ("jpegls", 13): (
        "|JeWc01FKOAOIl&0TBTI_y7$7AO8Rn07C&306_oR00;pA00000pa1{>0094e01CK(2m=6M3;=*&7zO}<U>F7ffM75f1O@{EfIwg{7z73b0RR9100Y-B00000J$8bCuY!"
        "VrfPjGl1PCC30tg_25P}Fo2q6e8p$I_{2t+~=5QIb_5eP&=5fFj0h=fRlkrG5n5hO&B5=2#m#FG+CNiihElM+lxF(Sewn3Bq}tg9-@vaaf~tg9-@vaG8r!0fE6J3Bi&J"
        "3A(;J3Bi&J3Bivx^{MU?c29*=<VCLZr^?Ib9?W;`|rN8ci(;Y-+i`UegA*|e;5CM|9}1p5C4DvfBpCWfB%2})&GD0fB$^{fB%2~Ve9{Y|9}5D|9}5~|7{=tfB%2}-~WI"
        "AfB1C&fB%2~Ie-6u|6JeyfB$}8|9}5@KmY&$0H7cNY=i+?J~0G90000oKmY&$0MXC@0000EDgaHe00000KJfqrga7~l00z-zEDTJaZNQkSqwN)kyxco^^B@2K004KOKm"
        "1-%^2N41v0xpMQ%qd|00amC03d(>0RU(K002OM00IC20000DddJKv9;37e000M)o&JhQfG<D*9zXy9f(oPy1ZUnojpsBPuCBhcK^v0mGyUFx0OJwrr<w1Fsw6qMwslsR"
        "rkb8p%xG0WsssQ45I_I`M?848L**3jYw>!%9W6mo$uM=LWvToC01zMm0Dy5I0&I@3000Ie)-GJJWtufRnhj5?j8z!0$?O0C2qaP8Y!h7W{6j?Dr;15(qd9FrglAL9poA"
        "PC=}}5|000CC000009yqm`=QTR?ildujmdeQh2M_=NAf8-W@}1CMALyr5+gWdTMzroBb}D-_>7bPmsD(MIK==oM1F-=A*#"
    ),
    ("jpeg", 13): (
        "|JeV;03ZMX0RRC700RL500000000044FLrT3k(1V2@VDa|HA+a4FDhjAprmp0RP$m2mt^91^@t`{{VmffBt@{J)Gy+&V8Kc+0K2O=h@DEoaeoD9ebUB;`hs@wXADe#<i"
        "?#TE?}kYg)#&tkzoAHLYV>)-|nTTGlnKV_McVtz&hTv8`(w*0HT?8rHF`YZ}(Et!o<HWsPfC*0qgmSk|?TYgpE`jcZuew^(ah#<i?#TE?}kYg)#&tZQ1vwXD`!)-|nTT"
        "GlnKV_McVtz%l&HLYWHma(mC8rHF`YZ}(Et!o<Av8`(w-DQnySk|?TYgpE`jcZuewT)|7*0)$|TE?}kYg)#&tZQ1vwXADe#<i^0TGlnKV_McVtz%l&HLYV>)-|nTb(XQ"
        "MYZ}(Et!o<Av8`(w*0HT?8r@}$YgpE`jcZuewT)|7*0qgmSk|{#Yg)#&tZQ1vwXADe#<i?#TE?}k)>_sztz%l&HLYV>)-|nTTGlnKV|A9Xt!o<Av8`(w*0HT?8rHF`YZ"
        "~2UjcZuewT)|7*0qgmSk|?TYgpE|SZi9wwXADe#<i?#TE?}kYg)#&tkzoAHLYV>)-|nTTGlnKV_McVtz&hTv8`(w*0HT?8rHF`YZ}(Et!o<HWsPfC*0qgmSk|?TYgpE`"
        "jcZuew^(ah#<i?#TE?}kYg)#&tZQ1vwXD`!)-|nTTGlnKV_McVtz%l&HLYWHma(mC8rHF`YZ}(Et!o<Av8`(w-DQnySk|?TYgpE`jcZuewT)|7*0)$|TE?}kYg)#&tZQ"
        "1vwXADe#<i^0TGlnKV_McVtz%l&HLYV>)-|nTb_M?cu>5t}`^4|oXQGkDJ=5mx(e#vg{kxHU0Zr0efP9Sm?{@@zM&owtO;EGpzv$lfEGJ5DZ|6Jg{Y$Obr^nmFpVy|U5"
        "4oTCU8KBFy?#2Vu&C$)?PKD?uu01YyNmq`Z3h?!0{vVa<S-xmyY|oIPgVZjz4G_ycH8G;cbN0I@ALEX%U!#!5vtEH_Gq1bOk4PpuhzEe3-n#5YWEGeWjfxq6~66%J}2C"
        "Cv!@)-sU=6t;*QH6Ar8BTQ$wU*-;nq{#GPKgC~YS1<93#DMs@o7sg$c1wX2IJ!CY9bmrVqp&eV3oEHuT(>61{0+snp{!A;f#>9Wwp`Xl3n;N$4yQ>6O>`eNh3;UKL8zl"
        "ZGu>VJ>>g?_dNAp95J_VvTrGnKzN7hv7@#`Zn%?RCzoO#S_QSlMyJG1qsgvAE#>*#"
    ),
    ("jpegls", 16): (
        "|JeWc01FTRAOIl&0TBTI_y7$7|Nj6I07C&306_oR00;pA00000pa1{>0000F|9Sud6~q7t0AK-t1^@^Ezy<&?0DuetU;_XM0e~0*fCvGA7y*C?0e~0*fCvGA7y$qP000"
        "01{c`{S00001{dRy*0vEt21ppuf0DvF}0sw$OAP52h0DwRsARrJ32nYlM0s;XHpdcV15FkK6K!E`P0t5sE2oMkuAV5GsfdK&m1Ox$wP#{1+f&>H*K!F4hAVCBO5J3V25"
        "I}(h5FkQ^5MV(B7!W}Q1Q0=i1Q1|B1Q-xO1_Tg6fdml31Q0_42qA(Hh6q9!AqZfEA%YNw2tpXT5QYds7$FE?gdu_uh6q9!AqZfEA%HPtA%YNw2#8>ah6spYh=vG=V2Fk"
        "YB~ZZ;3=t5)5eyL!!4V7*5Wx``A`rR=h`|vUB1RHM5=Ih65=Ih6Q6ym`VI*NBVI*NBVI*NBU>P)wB#b1CDln+RqY8{FFocpYsKTQPj4Cjw!lMe9Q5Hg`6)>rbG0bxu$1"
        "*NsnC3Z-W0>YSfM_!u$1%)v9LF)tMD)io%yS&aG0bxqildn9b~`&eJ3Beq+1c6I+1c0(*3Qn(&d$!x$uVbVXJ=<;XJ$$#XJ=<;Zr!^r+qZ7ryLRjbQ{R2}-+lEZ-+lMr"
        "efE=IefQsg{}TUy|9}5rAOHXW001ok00000bdUf50000R_n-g(0000V#S_5*0001g00Hi$9nLDtn_~!QwSZQNQe5#jV7H^Q^PBa6@>uEhVTmTz000j<ThkZ-+j)g~Wj0"
        "CW)}N!35CPV3000017#BwrEQ4PyCNP7X0000000$}jUi=sv6BJ&pi~!Dl-~a#s0022p!c+j22qnX^p+Eot0001TUYSrDv8kJ8R1+!}-UXEc%7T~lIYX|}8BnXmFaQ7mA"
        "iA7hK^0Nml>{zzGN6-I))J4hK074=c2ofU0Pm^A-L&v!KTOuLo|#cUC5yy;c*ay4Df71Na%{?nWj=isaT+wv44Bw9&8=or^LnyT9hDDXf9K-Le10}EpOI7-`7EcZv84J"
        "VDe;vSo$c9_N#!VFyt!FVOsKR%a<na#7RrZZL!}y<7{DVBZbs~r%QG^d*-&h!$I`<p0iMwcHp+?5IZ3ZI?wL^Qp3k+6?#D8RhHBHH@|?<pWk6j5D8kuKmjw){doZ?C0("
        "R?Uxc}J"
    ),
    ("jpeg", 16): (
        "|JeV;03ZMX0RaF500RI60RR91000044*>-Z01OQX3J?hk|HA+a5C9+mAprmp0RP$m2mt^91^@v5=l6fgPj2tGciX$|-S+PLcYV9J>#qL4-`D>DFMhgfTE?}kYg)#&tZQ"
        "1vwXADe&SkA*TGlnKV_McVtz%l&HLYV>);F1J8rHF`YZ}(Et!o<Av8`(w*0HVTSk|?TYgpE`jcZuewT)|7*0qgmd4{#DYg)#&tZQ1vwXADe#<i?#TFzyyV_McVtz%l&H"
        "LYV>)-|nTTGlt2YZ}(Et!o<Av8`(w*0HT?8rHF`=2+IXjcZuewT)|7*0qgmSk|?TYk7vXtZQ1vwXADe#<i?#TE?}kYg*1_tz%l&HLYV>)-|nTTGlnKV_McXnQI!>v8`("
        "w*0HT?8rHF`YZ}(Et>#$PwT)|7*0qgmSk|?TYgpE`jca*^wXADe#<i?#TE?}kYg)#&tZQ1%Wvydc)-|nTTGlnKV_McVtz%l&H<@c1*0HT?8rHF`YZ}(Et!o<Av90D<*0"
        "qgmSk|?TYgpE`jcZuewT)|ehPA9~TE?}kYg)#&tZQ1vwXADe&SkA*TGlnKV_McVtz%l&HLYV>);F1J8rHF`YZ}(Et!o<Av8`(w*0HVTSk|?TYgpE`jcZuewT)|7*0qgm"
        "d4{#DYg)#&tZQ1vwXADe#<i?#TFzyyV_McVtz%l&HLYV>)-|nTTGlt2YZ}(Et!o<Av8`(w*0HT?8rHF`=2+IXjcZuewT)|7*0qgmSk|?TYk7vXtZQ1vwXADe#<i?#TE?"
        "}kYg*1_tz%l&HLYV>)-|nTTGlnKV_McXrUl9vEbh@)-sJJ$nmfuzV;}zjpEpCIy(vfid!%1@741@AFb}RXM(-&>7Ib@?zt>H5iz$u$=K5h@R+Y84{dw2W{Pa55qMuXko"
        "af!?`Y1F>o3G-_NpDcpen_e%ijrUneProaQGz=x9Lt6PgVSguU>1fB>x2BrdV~CTd+N`p6VPAUn)HJ6>xXA=e<OCRc`SDLA9LlXUCm@}O!0Ht=qE7gj<@eASG!x$1|lx"
        "qdsns_US(+B(M4aOw3mtB9Vt3-b2}uTaq|45(=1~`7Izt@gb2T<$H&L5N%MN>C~s12kLLYpWa=^x*HulCRonvStx&9*!CaOr;dJx_kDF6l2$VEkayl6_LL08~%F(YB{T"
        "LD^%V5Qq5#Hfx9FZJvqoeL1SLQli6l8+U12f=&pY-YY-}lt7&9C5t-9`32yKFt2&OyHVqU46|-ZwmZgzZ(%<dYX4uKu(0E_%?!o!;rO(2c<V*#"
    ),
}


def dataset(
    words: np.ndarray,
    bits: int | None = 12,
    signed: bool = False,
    syntax: str = "explicit",
    **tags: object,
) -> Dataset:
    """A CT slice whose stored words are `words` (rows, cols) uint16; `tags` are further elements by
    keyword, None leaves one out.
    """
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = SYNTAXES[syntax]
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "2.25.1"
    ds.PatientName = NO_NAME
    ds.Rows, ds.Columns = words.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.BitsAllocated = 1, "MONOCHROME2", 16
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits or 16, (bits or 16) - 1, int(signed)
    ds.RescaleSlope, ds.RescaleIntercept, ds.PixelSpacing = 1, -1024, [0.7, 0.8]
    ds.ImageOrientationPatient, ds.ImagePositionPatient, ds.InstanceNumber = (
        [1, 0, 0, 0, 1, 0],
        [0, 0, 0],
        1,
    )
    set_pixels(ds, words, syntax)
    for keyword, value in tags.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    if bits is None:
        del ds.BitsStored, ds.HighBit
    return ds


def set_pixels(ds: Dataset, words: np.ndarray, syntax: str) -> None:
    """Encode `words`; JPEG-LS and JPEG lossless only know `pattern(BitsStored)`."""
    bits = ds.BitsStored
    if syntax == "j2k":
        values = (
            words.astype(np.int64)
            - (words.astype(np.int64) >> (bits - 1) << bits) * ds.PixelRepresentation
        )
        ds.file_meta.TransferSyntaxUID = SYNTAXES["explicit"]
        kind = np.int16 if ds.PixelRepresentation else np.uint16
        ds.compress(
            SYNTAXES["j2k"],
            values.astype(kind),
            encoding_plugin="pylibjpeg",
            generate_instance_uid=False,
        )
    elif syntax == "rle":
        ds.PixelData = encapsulate([encode_pixel_data(words.tobytes(), ds, "<")])
    elif (syntax, bits) in STREAMS:
        assert np.array_equal(words, pattern(bits))
        ds.PixelData = encapsulate([base64.b85decode(STREAMS[syntax, bits])])
    else:
        ds.PixelData = words.astype(">u2" if syntax == "big" else "<u2").tobytes()
    ds["PixelData"].VR = "OW" if syntax in ("explicit", "implicit", "deflated", "big") else "OB"


def to_bytes(ds: Dataset) -> bytes:
    """The file."""
    buffer = io.BytesIO()
    syntax = ds.file_meta.TransferSyntaxUID
    ds.save_as(
        buffer,
        enforce_file_format=True,
        implicit_vr=syntax == SYNTAXES["implicit"],
        little_endian=syntax != SYNTAXES["big"],
    )
    return buffer.getvalue()


def write_series(
    folder: Path,
    count: int,
    syntax: str = "rle",
    seed: int = 0,
    shape: tuple[int, int] = (32, 40),
    first: int = 1,
) -> None:
    """`count` good slices `<first>.dcm` and on, 3 mm apart, superior first: smooth anatomy-like
    words with noise, all different, and a strip of air.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    for k in range(count):
        words = 1000 + 60 * np.sin(x / 5 + k) * np.cos(y / 4) + rng.normal(0, 20, shape)
        words[0] = 24  # -1000 HU
        instance = first + k
        ds = dataset(
            words.astype("<u2"),
            syntax=syntax,
            InstanceNumber=instance,
            ImagePositionPatient=[0, 0, -3.0 * k],
        )
        (folder / f"{instance}.dcm").write_bytes(to_bytes(ds))


def naive_window(
    stored: np.ndarray, slope: float = 1.0, intercept: float = -1024.0, inverted: bool = False
) -> np.ndarray:
    """The pixel rule, spelled out on signed stored values in float64."""
    hu = stored.astype(np.float64) * slope + intercept
    image = np.clip(np.rint((hu + 150) * 255 / 400), 0, 255).astype(np.uint8)
    return 255 - image if inverted else image
