//! Layers upon layers: frozen ones, and ones that take over what is below.

use super::*;

#[tokio::test]
async fn what_was_streamed_reads_the_same_without_the_base() {
    let (below, above) = (Trio::new(1), Trio::new(4));
    let lower = Arc::new(below.create(100 * BLOCK, Base::new(vec![9; 50 * BLOCK_BYTES + 10])));
    lower.write(5000, &[1; 30_000]).await.unwrap();
    lower.write_zeroes(40 * BLOCK, 20 * BLOCK).await.unwrap();
    let upper = above.create(100 * BLOCK, Arc::clone(&lower) as _);
    upper.write(6000, &[2; 100]).await.unwrap();
    let before = read(&upper, 0, 100 * BLOCK_BYTES).await;
    assert_eq!(lower.own_ranges(), [BLOCK..9 * BLOCK, 40 * BLOCK..51 * BLOCK]);
    let mut streamed = 0;
    for range in lower.own_ranges() {
        streamed += upper.stream_from_base(range).await.unwrap();
    }
    assert_eq!(streamed, (8 + 11 - 1) * BLOCK, "its own block is not streamed again");
    upper.set_base(Base::new(vec![9; 50 * BLOCK_BYTES + 10]));
    drop(lower);
    assert!(read(&upper, 0, 100 * BLOCK_BYTES).await == before);
    upper.flush().await.unwrap();
    drop(upper);
    let upper = above.power_cut().open(Base::new(vec![9; 50 * BLOCK_BYTES + 10]));
    assert!(read(&upper, 0, 100 * BLOCK_BYTES).await == before);
}

#[tokio::test]
async fn a_frozen_overlay_refuses_changes_and_can_still_be_flushed() {
    let trio = Trio::new(1);
    let base = Base::new(vec![9; 5000]);
    let disk = trio.create(10 * BLOCK, base.clone());
    disk.write(0, &[1; 10]).await.unwrap();
    let freezing = disk.freeze().await;
    let mut write = disk.write(0, &[2; 10]);
    assert!((&mut write).now_or_never().is_none(), "it waits until it is known what becomes of the layer");
    freezing.keep();
    drop(freezing);
    assert!(matches!(write.await, Err(DiskError::ReadOnly)));
    assert!(matches!(disk.try_write(0, &[2; 10]), Err(DiskError::ReadOnly)));
    assert!(matches!(disk.write_zeroes(0, BLOCK).await, Err(DiskError::ReadOnly)));
    assert!(matches!(disk.discard(0, BLOCK).await, Err(DiskError::ReadOnly)));
    assert_eq!(disk.access(), Access::ReadOnly);
    disk.flush().await.unwrap();
    drop(disk);
    assert_eq!(read(&trio.power_cut().open(base), 0, 11).await, [&[1; 10][..], &[9]].concat());
}

#[tokio::test]
async fn changes_go_on_when_a_freeze_is_given_up() {
    let trio = Trio::new(1);
    let disk = trio.create(10 * BLOCK, Base::new(vec![]));
    let freezing = disk.freeze().await;
    let write = disk.write(0, &[2; 10]);
    drop(freezing);
    write.await.unwrap();
    assert_eq!(disk.access(), Access::ReadWrite);
}
