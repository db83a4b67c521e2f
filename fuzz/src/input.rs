//! The fuzzer's bytes as a series of choices.

/// Choices are taken from the front; once the bytes are used up every number is 0, so that a target ends by
/// asking [`Input::is_empty`].
#[derive(Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// Choices from the fuzzer's bytes.
    pub fn new(bytes: &'a [u8]) -> Input<'a> {
        Input(bytes)
    }

    /// Whether all bytes are used up.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// At most `len_max` bytes.
    pub fn bytes(&mut self, len_max: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len_max.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let taken = self.bytes(N);
        out[..taken.len()].copy_from_slice(taken);
        out
    }

    /// Any number of one byte.
    pub fn u8(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// Any number of two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Any number of eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// One of `choices`, which are 1 to 256.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.u8()) % choices.len()]
    }

    /// A number below `bound`, which is not 0; 65536 and more are never chosen.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(self.u16()) % bound
    }
}
