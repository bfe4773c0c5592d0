//! zstd, one frame for a chunk, and nothing else accepted.

use zstd_safe::{CCtx, CParameter, DCtx};

/// A compressed chunk is sent only when it is smaller than this share.
const WORTH: (usize, usize) = (94, 100);
/// Samples that tell whether a chunk is worth compressing, and bytes of each.
const SAMPLES: usize = 8;
const SAMPLE: usize = 4096;
/// Smaller chunks are not sampled: it would cost as much as it saves.
const SAMPLED: usize = 128 << 10;

/// Why compressed data is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// It does not say that it holds exactly what is expected.
    #[error("compressed data does not hold exactly {0} bytes")]
    Size(usize),
    /// Several frames, a skippable one, trailing bytes or a dictionary.
    #[error("compressed data is not exactly one plain zstd frame")]
    Shape,
    /// zstd refuses it.
    #[error("compressed data is damaged: {0}")]
    Damaged(&'static str),
}

/// Compresses chunks; keeps its context.
pub struct Encoder {
    context: CCtx<'static>,
    level: Option<i32>,
    /// Chunks that it has tried as a whole.
    #[cfg(test)]
    tried: usize,
}

impl Encoder {
    /// An encoder; None when there is no memory.
    pub fn new() -> Option<Self> {
        let mut context = CCtx::try_create()?;
        context
            .set_parameter(CParameter::ContentSizeFlag(true))
            .and_then(|_| context.set_parameter(CParameter::ChecksumFlag(false)))
            .ok()?;
        Some(Encoder {
            context,
            level: None,
            #[cfg(test)]
            tried: 0,
        })
    }

    /// Compresses into `out` if that is worth it; returns the length.
    pub fn compress(&mut self, level: i32, data: &[u8], out: &mut [u8]) -> Option<usize> {
        if self.level != Some(level) {
            let set = CParameter::CompressionLevel(level);
            self.context.set_parameter(set).ok()?;
            self.level = Some(level);
        }
        if data.len() >= SAMPLED && !self.looks_compressible(data, out) {
            return None;
        }
        #[cfg(test)]
        {
            self.tried += 1;
        }
        let limit = worthwhile(data.len()).min(out.len());
        self.context.compress2(&mut out[..limit], data).ok()
    }

    /// Tries a few samples: data that is compressed or encrypted already would
    /// cost as much as any other, at the higher levels, and give nothing.
    fn looks_compressible(&mut self, data: &[u8], out: &mut [u8]) -> bool {
        let step = data.len() / SAMPLES;
        (0..SAMPLES).any(|i| {
            let sample = &data[i * step..i * step + SAMPLE];
            let limit = worthwhile(SAMPLE).min(out.len());
            self.context.compress2(&mut out[..limit], sample).is_ok()
        })
    }
}

/// The most bytes that compressed data may have.
fn worthwhile(len: usize) -> usize {
    len * WORTH.0 / WORTH.1
}

/// Decompresses chunks; keeps its context.
pub struct Decoder {
    context: DCtx<'static>,
}

impl Decoder {
    /// A decoder; None when there is no memory.
    pub fn new() -> Option<Self> {
        Some(Decoder {
            context: DCtx::try_create()?,
        })
    }

    /// Fills `out` exactly, or fails. Memory is bounded by `out` whatever the
    /// frame claims: it is decoded in one go, without a window of its own.
    pub fn decompress(&mut self, frame: &[u8], out: &mut [u8]) -> Result<(), CodecError> {
        let size = zstd_safe::get_frame_content_size(frame);
        if !matches!(size, Ok(Some(size)) if size == out.len() as u64 && size > 0) {
            return Err(CodecError::Size(out.len()));
        }
        let one = zstd_safe::find_frame_compressed_size(frame).is_ok_and(|len| len == frame.len());
        if !one || zstd_safe::get_dict_id_from_frame(frame).is_some() {
            return Err(CodecError::Shape);
        }
        match self.context.decompress(out, frame) {
            Ok(len) if len == out.len() => Ok(()),
            Ok(_) => Err(CodecError::Size(out.len())),
            Err(code) => Err(CodecError::Damaged(zstd_safe::get_error_name(code))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(data: &[u8]) -> Vec<u8> {
        let mut out = vec![0; data.len() + 100];
        let len = Encoder::new()
            .unwrap()
            .compress(1, data, &mut out)
            .expect("compressible");
        out.truncate(len);
        out
    }

    fn decode(frame: &[u8], len: usize) -> Result<Vec<u8>, CodecError> {
        let mut out = vec![0xAA; len];
        Decoder::new()
            .unwrap()
            .decompress(frame, &mut out)
            .map(|()| out)
    }

    #[test]
    fn round_trip() {
        let data: Vec<u8> = (0..100_000u32).map(|i| (i / 100) as u8).collect();
        assert_eq!(decode(&frame(&data), data.len()), Ok(data));
    }

    #[test]
    fn incompressible_data_is_left_alone() {
        let mut noise = vec![0; 1 << 20];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let mut encoder = Encoder::new().unwrap();
        let mut out = vec![0; 1 << 20];
        for len in [1, 4096, 65536, 1 << 20] {
            assert_eq!(encoder.compress(1, &noise[..len], &mut out), None);
        }
        // One part that can be compressed is enough to try.
        noise[300_000..700_000].fill(7);
        assert!(encoder.compress(1, &noise, &mut out).is_some());
    }

    #[test]
    fn only_what_looks_compressible_is_tried_as_a_whole() {
        let chunk = 1 << 20;
        let mut noise = vec![0; chunk];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let text = b"what repeats itself ".repeat(chunk / 20);
        let half = |at: usize| {
            let mut mixed = noise.clone();
            mixed[at..at + chunk / 2].copy_from_slice(&text[..chunk / 2]);
            mixed
        };
        let tries = |data: &[u8]| {
            let mut encoder = Encoder::new().unwrap();
            encoder.compress(9, data, &mut vec![0; chunk]);
            encoder.tried
        };
        assert_eq!(tries(&noise), 0);
        assert_eq!(tries(&noise[..SAMPLED]), 0);
        assert_eq!(tries(&noise[..SAMPLED - 1]), 1, "too small to be sampled");
        assert_eq!(tries(&text), 1);
        for at in [0, chunk / 4, chunk / 2] {
            assert_eq!(tries(&half(at)), 1, "text at {at}");
        }
    }

    #[test]
    fn a_level_holds_for_one_chunk() {
        let data: Vec<u8> = (0..100_000u64)
            .flat_map(|i| (i * i % 65_537 / 7).to_le_bytes())
            .collect();
        let mut out = vec![0; data.len()];
        let mut encoder = Encoder::new().unwrap();
        let mut at = |level| encoder.compress(level, &data, &mut out);
        let (low, high, again) = (at(-5), at(9), at(-5));
        assert!(high.is_some() && high < low, "{high:?} {low:?}");
        assert_eq!(low, again);
    }

    #[test]
    fn bombs_and_wrong_sizes_are_refused() {
        let bomb = frame(&vec![1; 64 << 20]);
        assert!(bomb.len() < 10_000);
        assert_eq!(decode(&bomb, 1 << 20), Err(CodecError::Size(1 << 20)));
        assert_eq!(decode(&frame(&[1; 500]), 499), Err(CodecError::Size(499)));
        assert_eq!(decode(&frame(&[1; 500]), 501), Err(CodecError::Size(501)));
        assert!(decode(&[], 10).is_err());
        assert!(decode(&[0; 10], 10).is_err());
    }

    #[test]
    fn exactly_one_frame() {
        let one = frame(&[1; 500]);
        let twice = [one.clone(), one.clone()].concat();
        assert_eq!(decode(&twice, 500), Err(CodecError::Shape));
        assert_eq!(
            decode(&[one.as_slice(), b"x"].concat(), 500),
            Err(CodecError::Shape)
        );
        let skippable = [&[0x50, 0x2A, 0x4D, 0x18, 4, 0, 0, 0, 1, 2, 3, 4][..], &one].concat();
        assert!(decode(&skippable, 500).is_err());
    }

    /// Where the descriptor of a frame lies, behind the magic number.
    const DESCRIPTOR: usize = 4;
    const SINGLE_SEGMENT: u8 = 1 << 5;

    /// The same frame with a window of 2^log bytes in place of its content's size.
    fn windowed(frame: &[u8], log: u8) -> Vec<u8> {
        let mut out = frame.to_vec();
        assert_ne!(
            out[DESCRIPTOR] & SINGLE_SEGMENT,
            0,
            "it has a window already"
        );
        assert_ne!(
            out[DESCRIPTOR] >> 6,
            0,
            "the size would be lost with the flag"
        );
        out[DESCRIPTOR] &= !SINGLE_SEGMENT;
        out.insert(DESCRIPTOR + 1, (log - 10) << 3);
        out
    }

    #[test]
    fn no_window_makes_the_decoder_allocate_one() {
        let data: Vec<u8> = (0..100_000u32).map(|i| (i / 100) as u8).collect();
        let frame = frame(&data);
        let mut decoder = Decoder::new().unwrap();
        let mut out = vec![0; data.len()];
        decoder.decompress(&frame, &mut out).unwrap();
        let before = decoder.context.sizeof();
        for log in 27..=31 {
            out.fill(0xAA);
            let asks = windowed(&frame, log);
            assert_eq!(decoder.decompress(&asks, &mut out), Ok(()), "2^{log}");
            assert!(out == data, "2^{log}");
            assert_eq!(decoder.context.sizeof(), before, "2^{log} bytes");
        }
        // No zstd has such windows, and none reads such a head.
        for log in 32..=41 {
            let refused = decoder.decompress(&windowed(&frame, log), &mut out);
            assert_eq!(refused, Err(CodecError::Size(data.len())), "2^{log}");
        }
        assert_eq!(decoder.context.sizeof(), before);
    }

    #[test]
    fn a_frame_that_needs_a_dictionary_is_refused() {
        let data: Vec<u8> = (0..100_000u32).map(|i| (i / 100) as u8).collect();
        // The frame is right in all else: the number of the dictionary comes
        // before the size, and none of its blocks uses any.
        for (flag, number) in [(1, &[7][..]), (2, &[7, 0]), (3, &[7, 0, 0, 0])] {
            let mut asks = frame(&data);
            asks[DESCRIPTOR] |= flag;
            asks.splice(DESCRIPTOR + 1..DESCRIPTOR + 1, number.iter().copied());
            assert_eq!(decode(&asks, data.len()), Err(CodecError::Shape), "{flag}");
        }
        // One without a number is not known by its head, but its blocks lead nowhere.
        let mut noise = vec![0; 20_000];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let mut context = CCtx::create();
        context.load_dictionary(&noise).unwrap();
        let mut asks = vec![0; noise.len()];
        let len = context.compress2(&mut asks[..], &noise).unwrap();
        assert!(len < 1000, "it does not use the dictionary: {len} bytes");
        assert!(decode(&asks[..len], noise.len()).is_err());
    }

    #[test]
    fn truncated_and_damaged_frames_never_panic() {
        let data: Vec<u8> = (0..20_000u32).map(|i| (i * i / 77) as u8).collect();
        let good = frame(&data);
        for len in 0..good.len() {
            assert!(decode(&good[..len], data.len()).is_err(), "cut at {len}");
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x55;
            // It may decode to something else; the chunk hash is there for that.
            let _ = decode(&bad, data.len());
        }
    }
}
