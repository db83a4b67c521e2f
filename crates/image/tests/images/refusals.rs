//! Bad input, one by one: a clear error, and nothing left behind.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};

use image::{Format, ImportError, ImportProgress, ImportRequest};

use crate::support::{Bench, MIB, noise};

/// Imports, expects the error to pass `check` and its text to have all `words`, and nothing to be left.
#[track_caller]
fn refused(bench: &Bench, request: &ImportRequest, words: &[&str], check: impl Fn(&ImportError) -> bool) {
    let error = bench.try_import(request).expect_err("this must not be imported");
    assert!(check(&error), "another error was expected than {error:?}");
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "{text:?} does not say {word:?}");
    }
    assert_eq!(bench.images_entries(), 0, "something was left behind");
}

/// A bench with a small disk in `disk.raw` and `disk.qcow2`.
fn small() -> Bench {
    let bench = Bench::new();
    bench.write("disk.raw", &noise(1, 2 * MIB as usize));
    bench.qemu_img("convert -O qcow2 disk.raw disk.qcow2");
    bench
}

fn patch(bench: &Bench, name: &str, at: u64, bytes: &[u8]) {
    File::options().write(true).open(bench.file(name)).unwrap().write_all_at(bytes, at).unwrap();
}

fn cut(bench: &Bench, name: &str, len: u64) {
    File::options().write(true).open(bench.file(name)).unwrap().set_len(len).unwrap();
}

#[test]
fn what_is_not_there_or_no_file() {
    let bench = small();
    refused(&bench, &bench.request("missing.raw"), &["missing.raw"], |e| {
        matches!(e, ImportError::Unreadable { .. })
    });
    fs::create_dir(bench.file("dir")).unwrap();
    refused(&bench, &bench.request("dir"), &["dir", "regular file"], |e| {
        matches!(e, ImportError::NotAFile(_))
    });
    bench.write("empty.raw", b"");
    refused(&bench, &bench.request("empty.raw"), &["empty.raw", "0 bytes"], |e| {
        matches!(e, ImportError::Empty(_))
    });
    bench.qemu_img("create -f qcow2 large.qcow2 65T");
    refused(&bench, &bench.request("large.qcow2"), &["large.qcow2", "71468255805440"], |e| {
        matches!(e, ImportError::TooLarge { .. })
    });
}

#[test]
fn a_format_that_is_unknown_or_another_one_than_told() {
    let bench = small();
    bench.write("disk.gz", b"\x1f\x8b\x08 and so on");
    refused(&bench, &bench.request("disk.gz"), &["gzip", "unpack"], |e| {
        matches!(e, ImportError::UnknownFormat { .. })
    });
    bench.qemu_img("convert -O vdi disk.raw disk.vdi");
    refused(&bench, &bench.request("disk.vdi"), &["vdi", "qemu-img convert"], |e| {
        matches!(e, ImportError::UnknownFormat { .. })
    });
    bench.write("notes.txt", b"no disk");
    refused(&bench, &bench.request("notes.txt"), &["7 bytes", "raw"], |e| {
        matches!(e, ImportError::UnknownFormat { .. })
    });
    let told = ImportRequest { format: Some(Format::Vhdx), ..bench.request("disk.qcow2") };
    refused(&bench, &told, &["disk.qcow2", "vhdx"], |e| matches!(e, ImportError::WrongFormat { .. }));
}

#[test]
fn files_that_are_shorter_than_they_say() {
    let bench = small();
    let truncated = |e: &ImportError| matches!(e, ImportError::Truncated { .. });
    for (len, what) in [(MIB, "only 1048576 bytes"), (200_000, "200000"), (50, "header")] {
        cut(&bench, "disk.qcow2", len);
        refused(&bench, &bench.request("disk.qcow2"), &["disk.qcow2", "truncated", what], truncated);
    }
    let text: Vec<u8> = noise(2, MIB as usize).iter().map(|byte| byte & 0x0f).collect();
    bench.write("text.raw", &text);
    bench.qemu_img("convert -c -O qcow2 text.raw packed.qcow2");
    let len = fs::metadata(bench.file("packed.qcow2")).unwrap().len();
    cut(&bench, "packed.qcow2", len - 1024);
    refused(&bench, &bench.request("packed.qcow2"), &["a compressed cluster"], truncated);
    for (name, options) in [
        ("disk.vhdx", "-O vhdx -o block_size=1M"),
        ("disk.vmdk", "-O vmdk -o subformat=monolithicSparse"),
        ("stream.vmdk", "-O vmdk -o subformat=streamOptimized"),
    ] {
        bench.qemu_img(&format!("convert {options} disk.raw {name}"));
        let len = fs::metadata(bench.file(name)).unwrap().len();
        cut(&bench, name, len - 70_000);
        refused(&bench, &bench.request(name), &[name], |e| {
            // A stream without its footer cannot be told from one that is damaged.
            truncated(e) || name == "stream.vmdk" && matches!(e, ImportError::Damaged { .. })
        });
    }
    bench.qemu_img("convert -O vmdk -o subformat=monolithicFlat disk.raw flat.vmdk");
    cut(&bench, "flat-flat.vmdk", MIB);
    refused(&bench, &bench.request("flat.vmdk"), &["flat.vmdk", "1048576 bytes"], truncated);
}

#[test]
fn a_mapping_table_beyond_the_end_is_not_read_as_zeroes() {
    let bench = small();
    let mut l1_offset = [0; 8];
    File::open(bench.file("disk.qcow2")).unwrap().read_exact_at(&mut l1_offset, 40).unwrap();
    patch(&bench, "disk.qcow2", u64::from_be_bytes(l1_offset), &(1u64 << 63 | 1 << 40).to_be_bytes());
    refused(&bench, &bench.request("disk.qcow2"), &["L2 table", "1099511693312"], |e| {
        matches!(e, ImportError::Truncated { .. })
    });
}

#[test]
fn features_that_cannot_be_read_name_the_remedy() {
    let bench = small();
    let unsupported = |e: &ImportError| matches!(e, ImportError::Unsupported { .. });
    bench.qemu_img("convert -c -O qcow2 -o compression_type=zstd disk.raw zstd.qcow2");
    refused(&bench, &bench.request("zstd.qcow2"), &["zstd", "qemu-img convert"], unsupported);
    bench.qemu_img("convert -O qcow2 -o data_file=data.raw disk.raw external.qcow2");
    refused(&bench, &bench.request("external.qcow2"), &["external data", "qemu-img convert"], unsupported);
    bench.qemu_img("convert -O qcow2 -o extended_l2=on disk.raw subclusters.qcow2");
    refused(&bench, &bench.request("subclusters.qcow2"), &["subclusters", "qemu-img convert"], unsupported);
    bench.qemu_img("create -f vmdk base.vmdk 2M");
    bench.qemu_img("create -f vmdk -b base.vmdk -F vmdk snapshot.vmdk");
    refused(&bench, &bench.request("snapshot.vmdk"), &["parent", "qemu-img convert"], unsupported);
    patch(&bench, "disk.qcow2", 35, &[2]);
    refused(&bench, &bench.request("disk.qcow2"), &["encryption", "qemu-img convert"], unsupported);
    bench.qemu_img("create -u -f qcow2 -b nbd://127.0.0.1:1/x -F raw remote.qcow2 2M");
    refused(&bench, &bench.request("remote.qcow2"), &["nbd://", "qemu-img convert"], unsupported);
    bench.qemu_img("convert -O qcow2 disk.raw corrupt.qcow2");
    patch(&bench, "corrupt.qcow2", 79, &[2]);
    refused(&bench, &bench.request("corrupt.qcow2"), &["corrupt"], |e| {
        matches!(e, ImportError::Damaged { .. })
    });
}

#[test]
fn backing_files_and_extents_outside_the_allowed_directories() {
    let bench = small();
    let outside = |e: &ImportError| matches!(e, ImportError::Outside { .. });
    let secret = bench.outside().join("secret.raw");
    fs::copy(bench.file("disk.raw"), &secret).unwrap();

    bench.qemu_img(&format!("create -f qcow2 -b {} -F raw absolute.qcow2", secret.display()));
    bench.qemu_img("create -f qcow2 -b ../outside/secret.raw -F raw upward.qcow2");
    symlink(&secret, bench.file("innocent.raw")).unwrap();
    bench.qemu_img("create -f qcow2 -b innocent.raw -F raw linked.qcow2");
    bench.qemu_img("create -u -f qcow2 -b ../outside/none.raw -F raw probing.qcow2 2M");
    for name in ["absolute.qcow2", "upward.qcow2", "linked.qcow2", "probing.qcow2"] {
        refused(&bench, &bench.request(name), &["outside", "allow"], outside);
    }
    bench.qemu_img("convert -O vmdk -o subformat=twoGbMaxExtentSparse disk.raw split.vmdk");
    fs::rename(bench.file("split-s001.vmdk"), bench.outside().join("extent")).unwrap();
    symlink(bench.outside().join("extent"), bench.file("split-s001.vmdk")).unwrap();
    refused(&bench, &bench.request("split.vmdk"), &["outside", "extent"], outside);
    bench.qemu_img("convert -O vmdk -o subformat=monolithicFlat disk.raw flat.vmdk");
    let descriptor = fs::read_to_string(bench.file("flat.vmdk")).unwrap();
    bench.write("flat.vmdk", descriptor.replace("flat-flat.vmdk", "../outside/secret.raw").as_bytes());
    refused(&bench, &bench.request("flat.vmdk"), &["secret.raw"], outside);
    let elsewhere = ImportRequest { allowed_dirs: vec![bench.outside()], ..bench.request("disk.raw") };
    refused(&bench, &elsewhere, &["disk.raw"], outside);

    let both = vec![bench.outside(), bench.files()];
    let allowed = ImportRequest { allowed_dirs: both, ..bench.request("linked.qcow2") };
    assert!(bench.try_import(&allowed).is_ok(), "what is allowed is imported");
}

#[test]
fn chains_that_do_not_end() {
    let bench = small();
    bench.qemu_img("create -f qcow2 -b disk.raw -F raw a.qcow2");
    refused_missing(&bench);
    bench.qemu_img("create -f qcow2 -b a.qcow2 -F qcow2 b.qcow2");
    bench.qemu_img("rebase -u -b b.qcow2 -F qcow2 a.qcow2");
    let chain = |e: &ImportError| matches!(e, ImportError::Chain { .. });
    refused(&bench, &bench.request("b.qcow2"), &["builds upon itself", "qemu-img convert"], chain);

    for depth in 1..=33 {
        let below = if depth == 1 { "disk.qcow2".to_owned() } else { format!("c{}.qcow2", depth - 1) };
        bench.qemu_img(&format!("create -u -f qcow2 -b {below} -F qcow2 c{depth}.qcow2 2M"));
    }
    refused(&bench, &bench.request("c33.qcow2"), &["more than 32"], chain);
}

fn refused_missing(bench: &Bench) {
    bench.qemu_img("create -u -f qcow2 -b gone.raw -F raw orphan.qcow2 2M");
    refused(bench, &bench.request("orphan.qcow2"), &["orphan.qcow2", "gone.raw", "does not exist"], |e| {
        matches!(e, ImportError::BackingMissing { .. })
    });
}

#[test]
fn a_cancelled_import_leaves_nothing() {
    let bench = small();
    let progress = ImportProgress::default();
    progress.cancel();
    let error = image::import(&bench.request("disk.raw"), &bench.images(), &progress);
    assert!(matches!(error, Err(ImportError::Cancelled)), "{error:?}");
    assert_eq!(bench.images_entries(), 0);
}

#[test]
fn a_place_for_images_that_cannot_be_written() {
    let bench = small();
    let images = bench.write("a-file", b"");
    let error = image::import(&bench.request("disk.raw"), &images, &ImportProgress::default());
    assert!(matches!(error, Err(ImportError::Unwritable { .. })), "{error:?}");
}

#[test]
fn a_path_that_is_no_text() {
    use std::os::unix::ffi::OsStrExt;
    let bench = small();
    let odd = bench.files().join(std::ffi::OsStr::from_bytes(b"odd\xff.raw"));
    fs::copy(bench.file("disk.raw"), &odd).unwrap();
    let request = ImportRequest { file: odd, ..bench.request("disk.raw") };
    refused(&bench, &request, &["UTF-8", "rename"], |e| matches!(e, ImportError::Unsupported { .. }));
}
