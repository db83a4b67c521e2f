//! A recorded boot as what a guest reads: one chunk after the other, with the time it thought in between.
//!
//! The file is comma-separated: microseconds since the first request, operation, offset and length in bytes;
//! lines that begin with `#` are comments. Only reads count: writes go to a guest's own overlay.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use block::Geometry;

use crate::client::Read;
use crate::content::ChunkIx;

/// A recorded boot.
#[derive(Debug, Clone)]
pub struct Trace {
    /// Different chunks that it reads, numbered in the order of first touch, which is the boot profile's.
    pub(crate) chunks: u32,
    pub(crate) reads: Rc<[Read]>,
}

/// Whether guests take their recorded time between reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Thinking {
    AsRecorded,
    /// The next read comes at once: what is left is the time for reads.
    No,
}

impl Trace {
    /// Reads a recording.
    ///
    /// # Errors
    /// What is wrong, and in which line.
    pub fn parse(text: &str) -> Result<Trace, String> {
        let mut places: BTreeMap<u64, ChunkIx> = BTreeMap::new();
        let mut reads = Vec::new();
        let mut last = Duration::ZERO;
        let lines = text.lines().zip(1..).filter(|(line, _)| !line.starts_with('#') && !line.is_empty());
        for (line, number) in lines {
            let wrong = || format!("line {number} is not 'microseconds,operation,offset,length': {line}");
            let fields: Vec<&str> = line.split(',').collect();
            let [at, operation, offset, length] = fields[..] else { return Err(wrong()) };
            let number_of = |field: &str| field.parse::<u64>().map_err(|_| wrong());
            let at = Duration::from_micros(number_of(at)?);
            let length = usize::try_from(number_of(length)?).map_err(|_| wrong())?;
            let mut think = at.saturating_sub(last);
            last = last.max(at);
            if operation != "R" {
                continue;
            }
            for (index, _, _) in Geometry::split(number_of(offset)?, length) {
                let next = u32::try_from(places.len()).map_err(|_| wrong())?;
                let chunk = *places.entry(index.0).or_insert(ChunkIx(next));
                reads.push(Read { think, chunk });
                think = Duration::ZERO;
            }
        }
        match u32::try_from(places.len()) {
            Ok(chunks) if chunks > 0 => Ok(Trace { chunks, reads: reads.into() }),
            _ => Err("there is no read in the recording".to_owned()),
        }
    }

    pub(crate) fn with(&self, thinking: Thinking) -> Rc<[Read]> {
        match thinking {
            Thinking::AsRecorded => self.reads.clone(),
            Thinking::No => self.reads.iter().map(|read| Read { think: Duration::ZERO, ..*read }).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_numbered_in_the_order_of_first_touch_and_writes_only_cost_time() {
        let text = "# a boot\n0,R,131072,4096\n10,W,0,512\n30,R,65000,1000\n30,R,131072,1\n";
        let trace = Trace::parse(text).unwrap();
        let reads: Vec<_> = trace.reads.iter().map(|read| (read.think.as_micros(), read.chunk.0)).collect();
        assert_eq!(reads, [(0, 0), (20, 1), (0, 2), (0, 0)]);
        assert_eq!(trace.chunks, 3);
    }

    #[test]
    fn odd_lines_are_refused_by_number() {
        for bad in ["1,R,2", "x,R,1,1", "1,R,1,-1"] {
            let error = Trace::parse(&format!("0,R,0,1\n{bad}\n")).unwrap_err();
            assert!(error.starts_with("line 2 "), "{error}");
        }
        assert!(Trace::parse("# nothing\n").is_err());
    }
}
