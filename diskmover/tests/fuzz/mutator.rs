//! Changes bytes, the same way each time.

/// Numbers at which code goes wrong.
const EDGES: &[u64] = &[
    0,
    1,
    7,
    8,
    63,
    64,
    65,
    127,
    128,
    255,
    256,
    4095,
    4096,
    65535,
    65536,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    1 << 46,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];

pub struct Mutator(u64);

impl Mutator {
    pub fn new(seed: &str) -> Mutator {
        Mutator(seed.bytes().fold(1, |sum, byte| sum * 31 + u64::from(byte)))
    }

    /// One of the corpus, changed in one to four places.
    pub fn change(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut out = self.pick(corpus).clone();
        for _ in 0..=self.below(4) {
            self.step(&mut out, corpus);
        }
        out
    }

    fn step(&mut self, out: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        let at = self.below(out.len() + 1);
        let len = self.below(9).min(out.len() - at);
        match self.below(8) {
            0 if at < out.len() => out[at] ^= 1 << self.below(8),
            1 if at < out.len() => out[at] = self.next() as u8,
            2 | 3 => {
                // A number, in either order of bytes.
                let value = *self.pick(EDGES);
                let width = 1 << self.below(4);
                let little = value.to_le_bytes()[..width].to_vec();
                let big = value.to_be_bytes()[8 - width..].to_vec();
                let bytes = if self.below(2) == 0 { little } else { big };
                let end = (at + width).min(out.len());
                out.splice(at..end, bytes);
            }
            4 => drop(out.drain(at..at + len)),
            5 => {
                let again = out[at..at + len].to_vec();
                out.splice(at..at, again);
            }
            6 => out.truncate(at),
            _ => {
                let other = self.pick(corpus);
                let from = self.below(other.len() + 1);
                out.truncate(at);
                out.extend(&other[from..]);
            }
        }
    }

    fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    }
}
