//! What the disk makes of a unit that is busy, full of news, or cannot do everything.

use super::*;
use crate::initiator::session::Transfer;
use crate::scsi::Sense;

const BLOCK: usize = 4096;

/// A unit in memory with 64 blocks of 4096 bytes, which first gives the answers of a script.
struct Script {
    bytes: Vec<u8>,
    script: Vec<Reply>,
    /// The operation codes that it was sent.
    codes: Vec<u8>,
    /// Operation codes that it does not know.
    unknown: Vec<u8>,
}

fn status(status: u8) -> Reply {
    Reply { status, data: Vec::new(), sense: Vec::new(), is_whole: true }
}

fn check(key: u8, code: u16) -> Reply {
    let sense = Sense { key, code, information: None, field: None }.fixed();
    Reply { sense, ..status(2) }
}

impl Script {
    fn answer(&mut self, command: &Command) -> Reply {
        self.codes.push(command.cdb[0]);
        if self.unknown.contains(&command.cdb[0]) {
            return check(5, 0x2000);
        }
        if !self.script.is_empty() {
            return self.script.remove(0);
        }
        let at = scsi::number(&command.cdb[2..10]) as usize * BLOCK;
        let len = scsi::number(&command.cdb[10..14]) as usize * BLOCK;
        match (command.cdb[0], &command.transfer) {
            (0x88, Transfer::In(wanted)) => {
                assert_eq!(*wanted as usize, len);
                return Reply { data: self.bytes[at..at + len].to_vec(), ..status(0) };
            }
            (0x8a, Transfer::Out(data)) => self.bytes[at..at + len].copy_from_slice(data),
            (0x93, Transfer::Out(block)) => {
                assert_eq!(block[..], [0; BLOCK]);
                self.bytes[at..at + len].fill(0);
            }
            _ => {}
        }
        status(0)
    }
}

fn unit() -> Unit {
    Unit {
        size_bytes: 64 * BLOCK as u64,
        block_bytes: BLOCK as u32,
        access: Access::ReadWrite,
        transfer_bytes_max: 4 * BLOCK as u32,
        same: None,
        unmap: None,
        tells_holes: false,
        names: Vec::new(),
    }
}

/// Runs `work` on such a unit; the unit as it is afterwards.
async fn with<F: Future<Output = ()>>(
    unit: Unit,
    mut script: Script,
    work: impl FnOnce(Arc<UnitClient>) -> F,
) -> Script {
    let (sender, mut jobs) = mpsc::channel::<Job>(1);
    let target = tokio::spawn(async move {
        while let Some(job) = jobs.recv().await {
            let reply = script.answer(&job.command);
            let _ = job.done.send(Ok(reply));
        }
        script
    });
    work(Arc::new(UnitClient::new(unit, sender, Retry::For(std::time::Duration::from_secs(3))))).await;
    target.await.unwrap()
}

fn script(replies: Vec<Reply>) -> Script {
    Script { bytes: vec![9; 64 * BLOCK], script: replies, codes: Vec::new(), unknown: Vec::new() }
}

#[test]
fn pieces_end_where_pages_do_and_cover_the_range() {
    let pieces: Vec<_> = UnitClient::pieces(512, 10_240, 4096).collect();
    assert_eq!(pieces, [(512, 3584), (4096, 4096), (8192, 2048)]);
    assert_eq!(UnitClient::pieces(4096, 4096, 4096).count(), 0);
    assert_eq!(UnitClient::pieces(4096, 8192, 1 << 20).collect::<Vec<_>>(), [(4096, 4096)]);
}

#[tokio::test(start_paused = true)]
async fn a_busy_unit_is_asked_again() {
    let replies =
        vec![status(0x08), check(6, 0x2900), status(0x28), status(0x40), check(2, 0x0401), check(5, 0x2500)];
    let after = with(unit(), script(replies), async |client| {
        client.write(0, &[1; BLOCK]).await.unwrap();
    })
    .await;
    assert_eq!(after.codes, [0x8a; 7]);
    assert_eq!(after.bytes[..BLOCK], [1; BLOCK]);
}

#[tokio::test(start_paused = true)]
async fn a_unit_that_stays_busy_or_tells_news_without_end_is_an_error() {
    for reply in [status(0x08), check(5, 0x2500), check(6, 0x2900)] {
        let endless = vec![reply; 1000];
        with(unit(), script(endless), async |client| {
            let failed = client.write(0, &[1; BLOCK]).await;
            assert!(matches!(failed, Err(DiskError::Io(_))), "{failed:?}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_unit_whose_size_has_changed_is_not_used_any_more() {
    let after = with(unit(), script(vec![check(6, 0x2a09)]), async |client| {
        for _ in 0..2 {
            let Err(DiskError::Io(why)) = client.write(0, &[1; BLOCK]).await else {
                panic!("it has changed")
            };
            assert!(why.contains("size") && why.contains("open it anew"), "{why}");
        }
    })
    .await;
    assert_eq!(after.codes.len(), 1);
}

#[tokio::test]
async fn a_command_that_was_carried_out_in_part_is_an_error() {
    let short = Reply { is_whole: false, ..status(0) };
    with(unit(), script(vec![short.clone(), short]), async |client| {
        assert!(client.write(0, &[1; BLOCK]).await.is_err());
        assert!(client.read(0, &mut [1; BLOCK]).await.is_err());
    })
    .await;
}

#[tokio::test]
async fn ranges_that_do_not_fill_blocks_keep_what_is_around_them() {
    let after = with(unit(), script(Vec::new()), async |client| {
        client.write(BLOCK as u64 - 5, &[1; 10]).await.unwrap();
        client.write_zeroes(3 * BLOCK as u64 - 3, BLOCK as u64 + 6).await.unwrap();
        client.discard(9 * BLOCK as u64 - 3, 7 * BLOCK as u64 + 6).await.unwrap();
        let mut read = [0; 7];
        client.read(BLOCK as u64 - 6, &mut read).await.unwrap();
        assert_eq!(read, [9, 1, 1, 1, 1, 1, 1]);
    })
    .await;
    let zeroes: Vec<usize> = (0..after.bytes.len()).filter(|&i| after.bytes[i] == 0).collect();
    let expected = (3 * BLOCK - 3..4 * BLOCK + 3).chain(9 * BLOCK..16 * BLOCK);
    assert_eq!(zeroes, expected.collect::<Vec<_>>());
}

#[tokio::test]
async fn space_is_given_back_by_what_the_unit_has_and_zeroes_are_written_otherwise() {
    let clearing = |unmapping| Some(Clearing { blocks_max: 16, unmapping });
    let (same, unmap, holes) = (clearing(Unmapping::Allowed), clearing(Unmapping::Allowed), true);
    let plain = clearing(Unmapping::No);
    // What the unit has, and the commands for 32 blocks: four at a time with data, or 16 without.
    let cases = [
        (Unit { same, ..unit() }, &[][..], vec![0x93; 2]),
        (Unit { same, unmap, tells_holes: holes, ..unit() }, &[], vec![0x93; 2]),
        (Unit { same: plain, unmap, tells_holes: holes, ..unit() }, &[], vec![0x93, 0x93, 0x42, 0x42]),
        (Unit { unmap, tells_holes: holes, ..unit() }, &[], [vec![0x8a; 8], vec![0x42; 2]].concat()),
        (Unit { unmap, ..unit() }, &[], vec![0x8a; 8]),
        (Unit { same, ..unit() }, &[0x93], [vec![0x93], vec![0x8a; 8]].concat()),
        (unit(), &[], vec![0x8a; 8]),
    ];
    for (unit, unknown, codes) in cases {
        let script = Script { unknown: unknown.to_vec(), ..script(Vec::new()) };
        let after = with(unit.clone(), script, async |client| {
            client.discard(0, 32 * BLOCK as u64).await.unwrap();
        })
        .await;
        assert_eq!(after.codes, codes, "{unit:?}");
        assert!(after.bytes[..32 * BLOCK].iter().all(|b| *b == 0), "{unit:?}");
        assert_eq!(after.bytes[32 * BLOCK], 9);
    }
}

#[tokio::test]
async fn a_unit_without_a_cache_has_nothing_to_flush() {
    let script = Script { unknown: vec![0x35], ..script(Vec::new()) };
    with(unit(), script, async |client| client.flush().await.unwrap()).await;
}

#[tokio::test]
async fn a_change_within_a_block_keeps_others_away_though_nobody_waits_for_it() {
    let (sender, mut jobs) = mpsc::channel::<Job>(8);
    let client = Arc::new(UnitClient::new(unit(), sender, Retry::Forever));
    let writing = Arc::clone(&client);
    let cancelled = tokio::spawn(async move { writing.write(3, &[1; 9]).await });
    let block = jobs.recv().await.unwrap();
    block.done.send(Ok(Reply { data: vec![9; BLOCK], ..status(0) })).unwrap();
    let write = jobs.recv().await.unwrap();
    assert_eq!(write.command.cdb[0], 0x8a);
    cancelled.abort();
    assert!(cancelled.await.is_err());
    let neighbour = Arc::clone(&client);
    let mut neighbour = tokio::spawn(async move { neighbour.write(0, &[2; BLOCK]).await });
    tokio::select! {
        biased;
        job = jobs.recv() => panic!("{job:?} came while the block was held"),
        () = tokio::task::yield_now() => {}
    }
    drop(write);
    tokio::select! {
        job = jobs.recv() => job.unwrap().done.send(Ok(status(0))).unwrap(),
        ended = &mut neighbour => panic!("{ended:?}"),
    }
    neighbour.await.unwrap().unwrap();
}
