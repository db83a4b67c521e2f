//! Guests that move from one QEMU to another, each with a disk of its own.

use std::path::Path;
use std::sync::atomic::Ordering;

use testkit::memory_disk::Asked;
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;

use super::super::migrate::Paused;
use super::super::state::RunState;
use super::super::*;
use super::counting::{Site, assert_counted};
use super::{hand_over, sendable, wait_for};

/// A destination for this guest, that listens for it at its memory socket.
async fn destination(site: &Site, vm: &Qemu) -> Qemu {
    let spec = VmSpec { disk: site.vm_disk(), ..vm.spec().unwrap().clone() };
    Qemu::start_incoming(&site.vm_dir(), &spec).await.unwrap()
}

/// Takes a guest's memory and does nothing with it.
fn sink(path: &Path) -> JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            // However it ends.
            let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
        }
    })
}

/// Takes all of a guest's memory, to the last byte, and leaves without saying that it has it.
fn mute(path: &Path) -> JoinHandle<()> {
    // The stream ends with a description of all that was in it: the byte 6, its length, and JSON in which this
    // comes early.
    const EARLY: &[u8] = b"\"page_size\":";
    let listener = UnixListener::bind(path).unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut taken = Vec::new();
        let early = loop {
            let new = taken.len().saturating_sub(EARLY.len());
            assert_ne!(stream.read_buf(&mut taken).await.unwrap(), 0, "the stream has no end");
            if let Some(found) = taken[new..].windows(EARLY.len()).position(|window| window == EARLY) {
                break new + found;
            }
        };
        let head = taken[..early].windows(7).rposition(|head| head[0] == 6 && head[5..] == *b"{\"").unwrap();
        let len = u32::from_be_bytes(taken[head + 1..head + 5].try_into().unwrap());
        let mut rest = vec![0; head + 5 + len as usize - taken.len()];
        stream.read_exact(&mut rest).await.unwrap();
    })
}

async fn paused<'a>(vm: &'a Qemu, socket: &Path) -> Paused<'a> {
    vm.begin_migration(socket, None).await.unwrap().until_paused(|_| {}).await.unwrap()
}

/// Waits until the guest runs, however many steps QEMU takes to that.
async fn runs(vm: &Qemu) {
    while vm.state().await.unwrap() != RunState::Running {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_busy_guest_goes_on_elsewhere_and_neither_its_console_nor_its_disk_has_a_gap() {
    let (Some(here), Some(there)) = (Site::with_guest(), Site::empty()) else { return };
    let source = here.start().await;
    let target = destination(&there, &source).await;
    assert_eq!(target.state().await.unwrap(), RunState::InMigrate);
    let incoming = target.incoming_listen().await.unwrap();

    let mut reports = Vec::new();
    let migration = sendable(source.begin_migration(&target.memory_socket(), None)).await.unwrap();
    let paused = sendable(migration.until_paused(|progress| reports.push(progress))).await.unwrap();
    assert_eq!(source.state().await.unwrap(), RunState::FinishMigrate);
    assert!(
        paused.progress().transferred_bytes > 0 && paused.progress().passes > 0,
        "{:?}",
        paused.progress()
    );
    let asked = here.disk.asked();
    let flushed = asked.iter().rposition(|&asked| asked == Asked::Flush);
    let wrote = asked.iter().rposition(|&asked| asked == Asked::Write);
    assert!(flushed > wrote, "all that was written is flushed: {flushed:?}, {wrote:?}");
    there.copy_disk(&here);

    hand_over(paused, incoming).await;
    assert_eq!(source.state().await.unwrap(), RunState::PostMigrate);
    assert_eq!(target.state().await.unwrap(), RunState::Paused);
    let writes = |asked: &[Asked]| asked.iter().filter(|&&asked| asked == Asked::Write).count();
    assert_eq!(writes(&here.disk.asked()), writes(&asked), "the source writes nothing after the switchover");
    let early = there.disk.asked();
    let geometry = |asked: &Asked| matches!(asked, Asked::Read { offset: 0, len: 512 } | Asked::Flush);
    assert!(early.iter().all(geometry), "the destination reads nothing before it is resumed: {early:?}");
    assert_eq!(there.printed(), (Vec::new(), String::new()));

    target.resume().await.unwrap();
    assert_eq!(target.state().await.unwrap(), RunState::Running);
    wait_for(&target, r"(?:^[0-9a-f]{8}\n){50}").await.unwrap();
    assert_counted(&[&here, &there]);
    let progress = source.migration_progress().await.unwrap().expect("there was one");
    assert!(!progress.elapsed.is_zero(), "{progress:?}");
    assert!(target.forwarded_port(22).await.unwrap().is_some(), "its ports are forwarded from new ones");
}

#[tokio::test]
async fn a_guest_that_changes_its_memory_faster_than_it_leaves_arrives_all_the_same() {
    let (Some(here), Some(there)) = (Site::with_guest(), Site::empty()) else { return };
    let source = here.start().await;
    let target = destination(&there, &source).await;
    let incoming = target.incoming_listen().await.unwrap();
    // Of what the guest fills in a millisecond, a second of this takes nearly all.
    let migration = source.begin_migration(&target.memory_socket(), Some(512 << 10)).await.unwrap();
    let paused = migration.until_paused(|_| {}).await.unwrap();
    there.copy_disk(&here);
    hand_over(paused, incoming).await;
    target.resume().await.unwrap();
    wait_for(&target, r"(?:^[0-9a-f]{8}\n){5}").await.unwrap();
    assert_counted(&[&here, &there]);
}

#[tokio::test]
async fn a_migration_that_is_cancelled_or_forgotten_leaves_the_guest_running() {
    let Some(here) = Site::with_guest() else { return };
    let source = here.start().await;
    let socket = source.memory_socket();
    let sink = sink(&socket);

    // While it runs: at this speed the memory would take days.
    source.begin_migration(&socket, Some(1)).await.unwrap().cancel().await.unwrap();
    assert_eq!(source.state().await.unwrap(), RunState::Running);
    drop(source.begin_migration(&socket, Some(1)).await.unwrap());
    source.cancel_migration().await.unwrap();
    here.counts_on(&source).await;

    // While it stands still.
    paused(&source, &socket).await.cancel().await.unwrap();
    assert_eq!(source.state().await.unwrap(), RunState::Running);
    drop(paused(&source, &socket).await);
    runs(&source).await;
    here.counts_on(&source).await;

    // By a daemon that died, which another one finds.
    std::mem::forget(paused(&source, &socket).await);
    let found = Qemu::adopt(&here.vm_dir()).unwrap();
    assert_eq!(found.state().await.unwrap(), RunState::FinishMigrate);
    found.cancel_migration().await.unwrap();
    assert_eq!(found.state().await.unwrap(), RunState::Running);
    found.cancel_migration().await.expect("there is nothing more to cancel");
    here.counts_on(&found).await;
    assert_counted(&[&here]);
    sink.abort();
}

#[tokio::test]
async fn a_guest_that_was_paused_is_so_after_a_migration_that_did_not_come_about() {
    let Some(here) = Site::with_guest() else { return };
    let source = here.start().await;
    source.pause().await.unwrap();
    let socket = source.memory_socket();
    let sink = sink(&socket);
    paused(&source, &socket).await.cancel().await.unwrap();
    assert_eq!(source.state().await.unwrap(), RunState::Paused);
    source.resume().await.unwrap();
    here.counts_on(&source).await;
    assert_counted(&[&here]);
    sink.abort();
}

#[tokio::test]
async fn a_destination_that_is_lost_before_it_has_everything_leaves_the_guest_running() {
    let Some(here) = Site::with_guest() else { return };
    let source = here.start().await;
    for loss in ["while the guest runs", "while it stands still"] {
        let Some(there) = Site::empty() else { return };
        let target = destination(&there, &source).await;
        let incoming = target.incoming_listen().await.unwrap();
        let limit = (loss == "while the guest runs").then_some(64 << 10);
        let migration = source.begin_migration(&target.memory_socket(), limit).await.unwrap();
        let failed = if limit.is_some() {
            target.kill().await.unwrap();
            migration.until_paused(|_| {}).await.map(drop)
        } else {
            let paused = migration.until_paused(|_| {}).await.unwrap();
            target.kill().await.unwrap();
            paused.complete().await.map(drop)
        };
        assert!(matches!(failed, Err(VmError::Migration(_))), "{loss}: {failed:?}");
        assert_eq!(source.state().await.unwrap(), RunState::Running, "{loss}");
        here.counts_on(&source).await;
        let ended = incoming.arrived().await;
        assert!(matches!(ended, Err(VmError::Migration(_))), "{loss}: {ended:?}");
    }
    assert_counted(&[&here]);
}

#[tokio::test]
async fn a_destination_that_took_everything_and_left_without_a_word_does_not_have_the_guest() {
    let Some(here) = Site::with_guest() else { return };
    let source = here.start().await;
    let socket = source.memory_socket();
    let mute = mute(&socket);
    let failed = paused(&source, &socket).await.complete().await;
    assert!(matches!(failed, Err(VmError::Migration(_))), "{failed:?}");
    mute.await.expect("it took everything");
    assert_eq!(source.state().await.unwrap(), RunState::Running);
    here.counts_on(&source).await;
    assert_counted(&[&here]);
}

#[tokio::test]
async fn a_destination_that_is_lost_before_it_was_resumed_leaves_a_guest_that_goes_on_at_the_source() {
    let (Some(here), Some(there)) = (Site::with_guest(), Site::empty()) else { return };
    let source = here.start().await;
    let target = destination(&there, &source).await;
    let incoming = target.incoming_listen().await.unwrap();
    let paused = paused(&source, &target.memory_socket()).await;
    hand_over(paused, incoming).await;
    target.kill().await.unwrap();
    source.resume().await.unwrap();
    here.counts_on(&source).await;
    assert_counted(&[&here]);
}

#[tokio::test]
async fn a_destination_that_cannot_take_the_guest_says_so_and_the_source_keeps_it() {
    let (Some(here), Some(there)) = (Site::with_guest(), Site::empty()) else { return };
    let source = here.start().await;
    let spec = VmSpec { disk: there.vm_disk(), memory_mib: 32, ..source.spec().unwrap().clone() };
    let target = Qemu::start_incoming(&there.vm_dir(), &spec).await.unwrap();
    let incoming = target.incoming_listen().await.unwrap();
    let migrated = async {
        let migration = source.begin_migration(&target.memory_socket(), None).await?;
        migration.until_paused(|_| {}).await?.complete().await
    };
    let (migrated, arrived) = tokio::join!(migrated, incoming.arrived());
    assert!(matches!(migrated, Err(VmError::Migration(_))), "{migrated:?}");
    let error = arrived.unwrap_err().to_string();
    assert!(error.contains("pc.ram"), "QEMU says what does not fit: {error}");
    here.counts_on(&source).await;
    assert_counted(&[&here]);
}

#[tokio::test]
async fn a_guest_that_waits_for_room_finds_it_elsewhere() {
    let (Some(here), Some(there)) = (Site::with_guest(), Site::empty()) else { return };
    let source = here.start().await;
    here.disk.full.store(true, Ordering::SeqCst);
    while source.state().await.unwrap() != RunState::IoError {
        tokio::task::yield_now().await;
    }
    let target = destination(&there, &source).await;
    let incoming = target.incoming_listen().await.unwrap();
    let paused = paused(&source, &target.memory_socket()).await;
    there.copy_disk(&here);
    hand_over(paused, incoming).await;
    target.resume().await.unwrap();
    wait_for(&target, r"(?:^[0-9a-f]{8}\n){5}").await.unwrap();
    assert_counted(&[&here, &there]);
}
