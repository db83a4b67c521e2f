//! The initiator over tgt, a target of other people: proofs, digests, and its death in the middle of a load.

#![allow(clippy::unwrap_used)] // Whatever fails here fails the test.

mod load;

use std::sync::Arc;

use block::{Access, Disk};
use iscsi::Credentials;
use iscsi::initiator::{self, Address, ConnectError, Digests, Initiator, Options, Secrets};
use load::{load, pattern};
use testkit::tgt::{NAME, Tgt};

const SIZE_BYTES: u64 = 8 << 20;

fn address(tgt: &Tgt, lun: u16) -> Address {
    format!("iscsi://127.0.0.1:{}/{NAME}/{lun}", tgt.port).parse().unwrap()
}

fn ours() -> Credentials {
    Credentials::new("node", b"correct horse").unwrap()
}

/// A daemon whose disk is for initiators that know the secret.
fn with_secret() -> Tgt {
    let mut tgt = Tgt::new(SIZE_BYTES);
    tgt.start();
    tgt.add_account("node", "correct horse", &[]);
    tgt.add_disk(&[], &[]);
    tgt
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tgt_and_the_initiator_prove_themselves_to_each_other() {
    let tgt = with_secret();
    tgt.add_account("disk", "battery staple", &["--outgoing"]);
    let log_in = async |initiator: Option<Credentials>, target: Option<Credentials>| {
        Initiator::connect(&address(&tgt, 1), Secrets { initiator, target }, Options::default()).await
    };
    let theirs = |secret: &str| Some(Credentials::new("disk", secret.as_bytes()).unwrap());
    for target in [None, theirs("battery staple")] {
        let disk = log_in(Some(ours()), target).await.unwrap();
        assert_eq!((disk.size_bytes(), disk.access()), (SIZE_BYTES, Access::ReadWrite));
        disk.close().await;
    }
    for initiator in [None, Some(Credentials::new("node", b"incorrect horse").unwrap())] {
        let refused = log_in(initiator, None).await;
        assert!(matches!(refused, Err(ConnectError::Credentials)), "{refused:?}");
    }
    let doubted = log_in(Some(ours()), theirs("battery acid 12")).await;
    assert!(matches!(doubted, Err(ConnectError::Unproven)), "{doubted:?}");
    let secrets = Secrets { initiator: Some(ours()), target: None };
    let gone = Initiator::connect(&address(&tgt, 7), secrets.clone(), Options::default()).await;
    assert!(matches!(gone, Err(ConnectError::NoUnit)), "{gone:?}");
    let controller = Initiator::connect(&address(&tgt, 0), secrets, Options::default()).await;
    assert!(
        matches!(&controller, Err(ConnectError::Unusable(why)) if why.contains("not a disk")),
        "{controller:?}"
    );
    let seen =
        initiator::discover("127.0.0.1", tgt.port, Secrets::default(), Options::default()).await.unwrap();
    assert_eq!((seen.len(), seen[0].target.as_str()), (1, NAME));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_over_tgt_is_in_its_file_with_and_without_digests() {
    let tgt = with_secret();
    for (seed, digests) in [(1, Digests::Avoided), (2, Digests::Preferred)] {
        let secrets = Secrets { initiator: Some(ours()), target: None };
        let options = Options { digests, ..Options::default() };
        let disk = Initiator::connect(&address(&tgt, 1), secrets, options).await.unwrap();
        let data = pattern(seed, 5 << 20);
        disk.write(1_000_001, &data).await.unwrap();
        disk.flush().await.unwrap();
        let mut read = vec![0; data.len()];
        disk.read(1_000_001, &mut read).await.unwrap();
        assert!(read == data, "{digests:?}");
        assert!(std::fs::read(tgt.file()).unwrap()[1_000_001..][..data.len()] == data, "{digests:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn nothing_is_lost_when_tgt_is_killed_in_the_middle_of_a_load() {
    let mut tgt = with_secret();
    let secrets = Secrets { initiator: Some(ours()), target: None };
    let disk = Initiator::connect(&address(&tgt, 1), secrets, Options::default()).await.unwrap();
    let disk = Arc::new(disk);
    let expected = load(&disk, 8, async |rounds_over| {
        if rounds_over % 20 == 0 {
            tgt.kill();
            // It comes up without a target first, then without secret, then without a disk.
            tgt.start();
            tgt.add_account("node", "correct horse", &[]);
            tgt.add_disk(&[], &[]);
        }
    })
    .await;
    assert!(std::fs::read(tgt.file()).unwrap() == expected, "the file has what was written last");
}
