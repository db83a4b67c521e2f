//! Ranges of bytes as SCSI commands: cut to what a command can carry, filled up to whole logical blocks, and
//! repeated where the unit says that it should be.

use std::sync::{Arc, OnceLock};

use block::{Access, Backoff, DiskError, Extent, ExtentKind};
use tokio::sync::{RwLock, mpsc, oneshot};
use tokio::time::Instant;

use super::Retry;
use super::limits::{ATTENTIONS_MAX, BACKOFF_FIRST, BACKOFF_MAX};
use super::scsi::{self, Unmapping, Verdict, classify};
use super::session::{Command, Hold, Job, Reply};
use super::unit::{Clearing, Unit};

/// The answer to a command that was handed over.
type Waiting = oneshot::Receiver<Result<Reply, DiskError>>;

/// A client of a logical unit, for any number of callers.
#[derive(Debug)]
pub(super) struct UnitClient {
    unit: Unit,
    /// `None` once it is closed.
    jobs: Option<mpsc::Sender<Job>>,
    retry: Retry,
    /// Held alone while a block is read, changed in part and written, so that no other write to it is undone.
    changes: Arc<RwLock<()>>,
    /// Set once the unit has another size than it had.
    resized: OnceLock<String>,
}

/// What a command that the unit does not know comes to.
#[derive(Debug)]
enum Known {
    Done(Reply),
    No(String),
}

impl UnitClient {
    pub(super) fn new(unit: Unit, jobs: mpsc::Sender<Job>, retry: Retry) -> UnitClient {
        UnitClient { unit, jobs: Some(jobs), retry, changes: Arc::default(), resized: OnceLock::new() }
    }

    pub(super) fn unit(&self) -> &Unit {
        &self.unit
    }

    /// Ends the connection as soon as nobody uses it.
    pub(super) fn close(&mut self) {
        self.jobs = None;
    }

    fn block_bytes(&self) -> u64 {
        self.unit.block_bytes.into()
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let size_bytes = self.unit.size_bytes;
        match offset.checked_add(len) {
            Some(end) if end <= size_bytes => Ok(()),
            _ => Err(DiskError::OutOfRange { offset, len, size_bytes }),
        }
    }

    fn check_change(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        if self.unit.access == Access::ReadOnly {
            return Err(DiskError::ReadOnly);
        }
        self.check(offset, len)
    }

    /// The logical blocks around a range: offset of the first, and end of the last.
    fn whole_blocks(&self, offset: u64, len: u64) -> (u64, u64) {
        let block = self.block_bytes();
        (offset / block * block, (offset + len).next_multiple_of(block))
    }

    /// The logical blocks within a range: offset of the first, and end of the last, which may be before it.
    fn inner_blocks(&self, offset: u64, len: u64) -> (u64, u64) {
        let block = self.block_bytes();
        (offset.next_multiple_of(block), (offset + len) / block * block)
    }

    fn blocks(&self, len: u64) -> u32 {
        u32::try_from(len / self.block_bytes()).expect("pieces have few blocks")
    }

    fn block_at(&self, offset: u64) -> u64 {
        offset / self.block_bytes()
    }

    /// The pieces of whole blocks that each fit one command of at most `longest` bytes. They end where a
    /// multiple of that does, so that no page of a guest is cut in two.
    fn pieces(start: u64, end: u64, longest: u64) -> impl Iterator<Item = (u64, u64)> {
        let mut at = start;
        std::iter::from_fn(move || {
            let piece_end = end.min((at / longest + 1) * longest);
            let piece = (at, piece_end - at);
            at = piece_end;
            (piece.1 > 0).then_some(piece)
        })
    }

    fn transfer_pieces(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
        UnitClient::pieces(start, end, self.unit.transfer_bytes_max.into())
    }

    async fn hand_over(&self, command: Command, hold: Option<Hold>) -> Result<Waiting, DiskError> {
        if let Some(why) = self.resized.get() {
            return Err(DiskError::Io(why.clone()));
        }
        let (done, answer) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or_else(ended)?;
        jobs.send(Job { command, done, hold }).await.map_err(|_| ended())?;
        Ok(answer)
    }

    /// Waits for the answer to a command, repeating it where that helps.
    async fn settle(
        &self,
        command: &Command,
        mut waiting: Waiting,
        hold: Option<&Hold>,
    ) -> Result<Known, DiskError> {
        let since = Instant::now();
        let (mut attentions, mut backoff) = (0, Backoff::new(BACKOFF_FIRST, BACKOFF_MAX));
        loop {
            let reply = waiting.await.map_err(|_| ended())??;
            let later = match classify(&reply) {
                Verdict::Good => return Ok(Known::Done(reply)),
                Verdict::Unknown(why) => return Ok(Known::No(why)),
                Verdict::Failed(error) => return Err(error),
                Verdict::Resized => {
                    let why = "the size of the logical unit has changed: open it anew".to_owned();
                    return Err(DiskError::Io(self.resized.get_or_init(|| why).clone()));
                }
                Verdict::Again(why) => {
                    attentions += 1;
                    if attentions > ATTENTIONS_MAX {
                        return Err(DiskError::Io(why));
                    }
                    None
                }
                Verdict::Later(why) => Some(why),
                // It was there: whoever took it away may put it back, as a restarted target does.
                Verdict::Gone => Some("the target has no such logical unit any more".to_owned()),
            };
            if let Some(why) = later {
                if let Retry::For(limit) = self.retry
                    && since.elapsed() > limit
                {
                    return Err(DiskError::Io(why));
                }
                tokio::time::sleep(backoff.pause()).await;
            }
            waiting = self.hand_over(command.clone(), hold.cloned()).await?;
        }
    }

    async fn ask(&self, command: &Command) -> Result<Known, DiskError> {
        let waiting = self.hand_over(command.clone(), None).await?;
        self.settle(command, waiting, None).await
    }

    /// Carries out commands together; their answers, in order. All must be carried out wholly.
    async fn all(
        &self,
        commands: impl Iterator<Item = Command>,
        hold: Option<&Hold>,
    ) -> Result<Vec<Reply>, DiskError> {
        let mut under_way = Vec::new();
        for command in commands {
            let waiting = self.hand_over(command.clone(), hold.cloned()).await?;
            under_way.push((command, waiting));
        }
        let mut replies = Vec::new();
        for (command, waiting) in under_way {
            match self.settle(&command, waiting, hold).await? {
                Known::Done(reply) if reply.is_whole => replies.push(reply),
                Known::Done(_) => {
                    return Err(DiskError::Io("the target carried out a part of a command".to_owned()));
                }
                Known::No(why) => return Err(DiskError::Io(why)),
            }
        }
        Ok(replies)
    }

    async fn read_blocks(&self, start: u64, end: u64) -> Result<Vec<Reply>, DiskError> {
        let read = |(at, len): (u64, u64)| {
            let bytes = u32::try_from(len).expect("pieces are short");
            scsi::read(self.block_at(at), self.blocks(len), bytes)
        };
        self.all(self.transfer_pieces(start, end).map(read), None).await
    }

    async fn write_blocks(&self, start: u64, data: &[u8], hold: Option<&Hold>) -> Result<(), DiskError> {
        let write = |(at, len): (u64, u64)| {
            let from = (at - start) as usize;
            scsi::write(self.block_at(at), self.blocks(len), &data[from..from + len as usize])
        };
        let pieces = self.transfer_pieces(start, start + data.len() as u64);
        self.all(pieces.map(write), hold).await?;
        Ok(())
    }

    pub(super) async fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), DiskError> {
        self.check(offset, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        let wanted_end = offset + buf.len() as u64;
        let (start, end) = self.whole_blocks(offset, buf.len() as u64);
        let mut at = start;
        for reply in self.read_blocks(start, end).await? {
            let len = reply.data.len() as u64;
            // What was read only to fill the first and last block is left out.
            let (from, to) = (at.max(offset), (at + len).min(wanted_end));
            let wanted = &reply.data[(from - at) as usize..(to - at) as usize];
            buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(wanted);
            at += len;
        }
        Ok(())
    }

    pub(super) async fn write(&self, offset: u64, data: &[u8]) -> Result<(), DiskError> {
        let len = data.len() as u64;
        self.check_change(offset, len)?;
        let (start, end) = self.whole_blocks(offset, len);
        if (start, end) == (offset, offset + len) {
            let _with_others = self.changes.read().await;
            return self.write_blocks(offset, data, None).await;
        }
        let alone = Arc::new(Arc::clone(&self.changes).write_owned().await);
        self.write_within(offset, data, &alone).await
    }

    /// Writes what does not fill its first and last block.
    async fn write_within(&self, offset: u64, data: &[u8], alone: &Hold) -> Result<(), DiskError> {
        let (start, end) = self.whole_blocks(offset, data.len() as u64);
        let block = self.block_bytes();
        let mut whole = vec![0; (end - start) as usize];
        let (first, last) = (start, end - block);
        for at in if first == last { vec![first] } else { vec![first, last] } {
            let from = (at - start) as usize;
            self.read(at, &mut whole[from..from + block as usize]).await?;
        }
        let from = (offset - start) as usize;
        whole[from..from + data.len()].copy_from_slice(data);
        self.write_blocks(start, &whole, Some(alone)).await
    }

    pub(super) async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check_change(offset, len)?;
        let (start, end) = self.inner_blocks(offset, len);
        if start >= end {
            return self.write(offset, &vec![0; len as usize]).await;
        }
        for (at, edge_end) in [(offset, start), (end, offset + len)] {
            if at < edge_end {
                self.write(at, &vec![0; (edge_end - at) as usize]).await?;
            }
        }
        self.clear(start, end).await
    }

    pub(super) async fn discard(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        self.check_change(offset, len)?;
        let (start, end) = self.inner_blocks(offset, len);
        if start >= end {
            return Ok(());
        }
        self.clear(start, end).await?;
        let gives_back = self.unit.same.is_some_and(|same| same.unmapping == Unmapping::Allowed);
        match self.unit.unmap {
            // Zeroes are there; now their space is given back, if the unit wishes. Only where what is not mapped
            // reads as zeroes are they still there then.
            Some(unmap) if !gives_back && self.unit.tells_holes => {
                let _with_others = self.changes.read().await;
                self.clear_by(start, end, unmap, scsi::unmap).await.map(|_| ())
            }
            _ => Ok(()),
        }
    }

    /// Makes whole blocks read as zeroes.
    async fn clear(&self, start: u64, end: u64) -> Result<(), DiskError> {
        let _with_others = self.changes.read().await;
        if let Some(same) = self.unit.same {
            let command =
                |block, blocks| scsi::write_same_zeroes(block, blocks, self.unit.block_bytes, same.unmapping);
            if self.clear_by(start, end, same, command).await? == Cleared::Yes {
                return Ok(());
            }
        }
        let zeroes = vec![0; self.unit.transfer_bytes_max as usize];
        for (at, len) in self.transfer_pieces(start, end) {
            self.write_blocks(at, &zeroes[..len as usize], None).await?;
        }
        Ok(())
    }

    /// Clears with commands that carry no data for each block, as far as the unit knows them.
    async fn clear_by(
        &self,
        start: u64,
        end: u64,
        clearing: Clearing,
        command: impl Fn(u64, u32) -> Command,
    ) -> Result<Cleared, DiskError> {
        let longest = u64::from(clearing.blocks_max) * self.block_bytes();
        for (at, len) in UnitClient::pieces(start, end, longest) {
            if let Known::No(_) = self.ask(&command(self.block_at(at), self.blocks(len))).await? {
                return Ok(Cleared::No);
            }
        }
        Ok(Cleared::Yes)
    }

    pub(super) async fn flush(&self) -> Result<(), DiskError> {
        if self.unit.access == Access::ReadWrite {
            // A unit without the command has no cache that could be flushed.
            self.ask(&scsi::synchronize_cache()).await?;
        }
        Ok(())
    }

    pub(super) async fn extents(&self, offset: u64, len: u64) -> Result<Vec<Extent>, DiskError> {
        self.check(offset, len)?;
        let unknown = |len| Ok(vec![Extent { len, kind: ExtentKind::Data }]);
        if len == 0 {
            return Ok(Vec::new());
        }
        if !self.unit.tells_holes {
            return unknown(len);
        }
        let start = offset / self.block_bytes() * self.block_bytes();
        let reply = match self.ask(&scsi::get_lba_status(self.block_at(offset))).await? {
            Known::Done(reply) => reply,
            Known::No(_) => return unknown(len),
        };
        let mut extents = scsi::extents_of(&reply.data, self.block_at(offset), self.unit.block_bytes);
        // Whole blocks were asked for, without an end: what lies before and behind the range is cut off.
        let (mut before, mut left) = (offset - start, len);
        for extent in &mut extents {
            let cut = extent.len.min(before);
            before -= cut;
            extent.len = (extent.len - cut).min(left);
            left -= extent.len;
        }
        extents.retain(|extent| extent.len > 0);
        if extents.is_empty() { unknown(len) } else { Ok(extents) }
    }
}

/// Whether a range was cleared by the commands made for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cleared {
    Yes,
    /// The unit does not know them.
    No,
}

fn ended() -> DiskError {
    DiskError::Io("the iSCSI initiator has ended".to_owned())
}

#[cfg(test)]
mod tests;
