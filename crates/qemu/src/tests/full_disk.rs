//! Guests whose disk has no room for what they write.

use std::sync::atomic::Ordering;

use super::super::state::RunState;
use super::super::*;
use super::counting::{Site, assert_counted};
use super::{sendable, wait_for};

async fn waits_for_room(vm: &Qemu) {
    while vm.state().await.unwrap() != RunState::IoError {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_guest_without_room_is_paused_and_goes_on_without_an_error_once_there_is_some() {
    let Some(site) = Site::with_guest() else { return };
    let vm = site.start().await;
    let watched = sendable(vm.supervise(|| !site.disk.full.load(Ordering::SeqCst)));
    let guest = async {
        for _ in 0..2 {
            site.disk.full.store(true, Ordering::SeqCst);
            waits_for_room(&vm).await;
            site.disk.full.store(false, Ordering::SeqCst);
            site.counts_on(&vm).await;
        }
        assert_counted(&[&site]);
        vm.kill().await.unwrap();
    };
    // The watch ends with the VM.
    tokio::join!(watched, guest);
}

#[tokio::test]
async fn a_guest_that_was_paused_for_want_of_room_is_found_by_a_later_daemon() {
    let Some(site) = Site::with_guest() else { return };
    let vm = site.start().await;
    site.disk.full.store(true, Ordering::SeqCst);
    waits_for_room(&vm).await;
    drop(vm);
    let vm = Qemu::adopt(&site.vm_dir()).unwrap();
    site.disk.full.store(false, Ordering::SeqCst);
    tokio::select! {
        () = vm.supervise(|| true) => panic!("the VM ended"),
        () = site.counts_on(&vm) => {}
    }
    assert_counted(&[&site]);
}

#[tokio::test]
async fn a_guest_that_wants_to_know_is_told_that_there_is_no_room() {
    let Some(site) = Site::with_guest() else { return };
    let spec = VmSpec { on_full: OnFull::Report, ..site.spec() };
    let vm = Qemu::start(&site.vm_dir(), &spec).await.unwrap();
    wait_for(&vm, "^00000010$").await.unwrap();
    site.disk.full.store(true, Ordering::SeqCst);
    wait_for(&vm, "^error$").await.unwrap();
    assert_eq!(vm.state().await.unwrap(), RunState::Running);
}
