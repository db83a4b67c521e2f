//! Every format, as `qemu-img` writes it, holds the same disk and gets the same id.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use block::Disk;
use image::{Format, Novelty, OriginImage};

use crate::support::{Bench, CHUNK, MIB, SIZE_BYTES, assert_same, volume};

/// Name, expected format, and how `qemu-img` makes it from `disk.raw`.
const KINDS: [(&str, Format, &str); 11] = [
    ("plain.qcow2", Format::Qcow2, "convert -O qcow2"),
    ("old.qcow2", Format::Qcow2, "convert -O qcow2 -o compat=0.10"),
    ("small.qcow2", Format::Qcow2, "convert -O qcow2 -o cluster_size=4k"),
    ("compressed.qcow2", Format::Qcow2, "convert -c -O qcow2"),
    ("sparse.vmdk", Format::Vmdk, "convert -O vmdk -o subformat=monolithicSparse"),
    ("stream.vmdk", Format::Vmdk, "convert -O vmdk -o subformat=streamOptimized"),
    ("flat.vmdk", Format::Vmdk, "convert -O vmdk -o subformat=monolithicFlat"),
    ("split.vmdk", Format::Vmdk, "convert -O vmdk -o subformat=twoGbMaxExtentFlat"),
    ("split-sparse.vmdk", Format::Vmdk, "convert -O vmdk -o subformat=twoGbMaxExtentSparse"),
    ("dynamic.vhdx", Format::Vhdx, "convert -O vhdx"),
    ("fixed.vhdx", Format::Vhdx, "convert -O vhdx -o subformat=fixed"),
];

#[tokio::test(flavor = "multi_thread")]
async fn the_same_disk_in_any_format_has_the_same_id_and_the_same_bytes() {
    let bench = Bench::with_reference();
    let raw = bench.file("disk.raw");
    let reference = bench.import("disk.raw");
    assert_eq!(reference.format, Format::Raw);
    assert_same(&volume(&reference), &raw, "disk.raw").await;
    for (name, format, convert) in KINDS {
        bench.qemu_img(&format!("{convert} disk.raw {name}"));
        let imported = bench.import(name);
        assert_eq!(imported.format, format, "{name}");
        assert_eq!(imported.id, reference.id, "{name}");
        assert_eq!(imported.novelty, Novelty::Known, "{name}");
        let origin = OriginImage::open(&imported.dir).unwrap();
        assert_eq!(origin.describe().path, bench.file(name).canonicalize().unwrap());
        assert_same(&volume(&imported), &raw, name).await;
    }
    assert_eq!(bench.images_entries(), 1, "one directory, whatever the format");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_of_three_reads_as_its_top() {
    let bench = Bench::with_reference();
    bench.qemu_img("convert -O qcow2 disk.raw base.qcow2");
    bench.qemu_img("create -f qcow2 -b base.qcow2 -F qcow2 middle.qcow2");
    bench.qemu_img("create -f qcow2 -b middle.qcow2 -F qcow2 top.qcow2");
    let base = bench.import("base.qcow2");
    let top = bench.import("top.qcow2");
    assert_eq!(top.id, base.id, "empty overlays change nothing");
    let files = OriginImage::open(&top.dir).unwrap().describe().files;
    let names: Vec<_> = files.iter().map(|file| file.path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["top.qcow2", "middle.qcow2", "base.qcow2"]);

    // A change in the middle, grown at the top, over a raw base whose format only the chain tells.
    let changed = bench.file("changed.raw");
    std::fs::copy(bench.file("disk.raw"), &changed).unwrap();
    let file = File::options().write(true).open(&changed).unwrap();
    file.write_all_at(b"changed", 77 * MIB).unwrap();
    file.write_all_at(&[0; 4096], 201 * MIB).unwrap();
    bench.qemu_img("create -f qcow2 -b disk.raw -F raw low.qcow2");
    bench.qemu_img("convert -O qcow2 -B low.qcow2 -F qcow2 changed.raw high.qcow2");
    bench.qemu_img("create -f qcow2 -b high.qcow2 -F qcow2 highest.qcow2");
    bench.qemu_img("resize highest.qcow2 +5M");
    file.set_len(SIZE_BYTES + 5 * MIB).unwrap();
    let imported = bench.import("highest.qcow2");
    assert_same(&volume(&imported), &changed, "highest.qcow2").await;
    assert_eq!(imported.id, bench.import("changed.raw").id);
}

#[test]
fn holes_are_not_read() {
    let bench = Bench::with_reference();
    bench.qemu_img("convert -O qcow2 disk.raw plain.qcow2");
    // Chunks that the data of the reference disk touches, from its offsets.
    let touched = |from: u64, len: u64| (from + len).div_ceil(CHUNK) - from / CHUNK;
    let chunks = touched(0, 200_000)
        + touched(128 * MIB - 1_000_000, 3_000_000)
        + touched(200 * MIB, MIB)
        + touched(250 * MIB + 4097, 21)
        + 1;
    let last = SIZE_BYTES % CHUNK;
    for name in ["disk.raw", "plain.qcow2"] {
        let imported = bench.import(name);
        assert_eq!(imported.bytes_read, (chunks - 1) * CHUNK + last, "bytes read of {name}");
        let all = SIZE_BYTES.div_ceil(CHUNK);
        assert_eq!(imported.root.chunk_count(), all, "{name}");
        assert_eq!(imported.root.zero_chunks(), all - chunks, "{name}");
    }
}

#[test]
fn a_huge_sparse_disk_is_imported_at_once_and_takes_no_space() {
    let bench = Bench::new();
    let file = File::create(bench.file("huge.raw")).unwrap();
    file.set_len(4 << 40).unwrap();
    file.write_all_at(b"the only data", 3 << 40).unwrap();
    let imported = bench.import("huge.raw");
    assert_eq!(imported.bytes_read, CHUNK);
    assert_eq!(imported.root.zero_chunks(), imported.root.chunk_count() - 1);
    let on_disk: HashMap<_, _> = std::fs::read_dir(&imported.dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            let blocks = std::os::unix::fs::MetadataExt::blocks(&entry.metadata().unwrap());
            (entry.file_name().into_string().unwrap(), blocks * 512)
        })
        .collect();
    assert!(on_disk["pages"] < MIB, "{on_disk:?}");
    let report = OriginImage::open(&imported.dir).unwrap().verify(&image::ImportProgress::default()).unwrap();
    assert!(report.is_right(), "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_of_three_levels_is_walked_to_its_chunks() {
    let bench = Bench::new();
    bench.qemu_img("create -f qcow2 -o cluster_size=2M huge.qcow2 20T");
    bench.qemu_io("write -P 0x5a 17T 64k", "huge.qcow2");
    bench.qemu_io("write -P 0xa5 1T 64k", "huge.qcow2");
    let imported = bench.import("huge.qcow2");
    assert_eq!(imported.root.chunk_count() - imported.root.zero_chunks(), 2);
    let volume = volume(&imported);
    for (at, expected) in [(17 << 40, 0x5a), (1 << 40, 0xa5), (3 << 40, 0), (20 << 40, 0)] {
        let mut buf = [1; 1000];
        volume.read(at - 1000, &mut buf).await.unwrap();
        assert_eq!(buf, [0; 1000], "before {at}");
        if at < volume.size_bytes() {
            volume.read(at, &mut buf).await.unwrap();
            assert_eq!(buf, [expected; 1000], "at {at}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_of_any_size_keeps_its_size() {
    let bench = Bench::new();
    for len in [1, 511, 512, 65_535, 65_536, 65_537, 131_072 + 1] {
        let name = format!("disk-{len}");
        bench.write(&name, &crate::support::noise(len as u64 + 1, len));
        let request = image::ImportRequest { format: Some(Format::Raw), ..bench.request(&name) };
        let imported = bench.try_import(&request).unwrap();
        assert_same(&volume(&imported), &bench.file(&name), &name).await;
    }
}
