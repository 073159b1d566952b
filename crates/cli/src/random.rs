//! Random numbers that any part of a run can take out of order: SplitMix64 with a stream per item.
//!
//! Small enough to write here, and a crate's generator may change its numbers with its version: then a
//! seed would not give the same graph again.

/// One stream of numbers.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// The stream of one item under this seed.
    pub(crate) fn new(seed: u64, item: u64) -> Self {
        Self(mix(seed ^ mix(item.wrapping_add(GAMMA))))
    }

    /// 64 random bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GAMMA);
        mix(self.0)
    }

    /// Twice 32 random bits.
    pub(crate) fn pair(&mut self) -> [u32; 2] {
        let [a, b, c, d, e, f, g, h] = self.bits().to_le_bytes();
        [
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, g, h]),
        ]
    }

    /// A number below `bound`, or 0. Its bias is below one in 2^32 for every bound below 2^32.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        let wide = u128::from(self.bits()) * u128::from(bound);
        u64::try_from(wide >> 64).expect("the upper half of 128 bits")
    }
}

/// The odd step of SplitMix64.
const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// Spreads 64 bits over 64 bits, one to one.
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first numbers of the reference implementation from state 0.
    #[test]
    fn as_the_reference() {
        let mut random = Random(0);
        let expected = [
            0xe220_a839_7b1d_cdaf,
            0x6e78_9e6a_a1b9_65f4,
            0x06c4_5d18_8009_454f,
        ];
        assert_eq!([random.bits(), random.bits(), random.bits()], expected);
    }

    #[test]
    fn below_its_bound() {
        let mut random = Random::new(1, 2);
        assert!((1..1000).all(|bound| random.below(bound) < bound));
        assert_eq!(random.below(0), 0);
    }
}
