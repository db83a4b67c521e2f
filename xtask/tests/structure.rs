//! What ARCHITECTURE.md promises of the inside of crates: modules import downward, types stay small, and what must not
//! know files, sockets, clocks or threads does not.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use syn::visit::Visit;
use syn::{Attribute, ImplItem, Item, ItemImpl, ItemMod, ItemUse, UseTree};

mod source;

use source::{root, rust_files};

/// Most methods of a type of the daemons: one with more has a second owner in it.
const METHODS_MAX: usize = 25;

/// The crates of which the daemons are made.
const DAEMONS: &[&str] = &["control", "identity", "node", "qemu", "volt"];

/// Parts of the standard library that a crate must not know. Time is clocks; a duration is but a number.
const STD_MUST_NOT_USE: &[(&str, &[&str])] = &[
    ("block", &["fs", "net", "thread", "time::Instant", "time::SystemTime"]),
    ("planner", &["fs", "net", "thread", "time::Instant", "time::SystemTime"]),
    ("sim", &["net", "thread", "time::SystemTime"]),
    ("link", &["fs", "net", "thread", "time::SystemTime"]),
    ("store", &["net"]),
    ("image", &["net"]),
    ("nbd", &["fs", "thread", "time::SystemTime"]),
    ("iscsi", &["thread"]),
];

/// Crates in which circles are still to be cut. The list may not grow.
const CIRCLES_LEFT: &[&str] = &["sim"];

/// The crates of the workspace under `crates`, by name.
fn crates() -> Vec<String> {
    let dirs = fs::read_dir(root().join("crates")).expect("the crates");
    let mut names: Vec<String> =
        dirs.map(|dir| dir.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    assert!(names.len() > 10, "the crates were not found: {names:?}");
    names
}

/// The path of a module within its crate; that of the crate's root is empty.
type ModulePath = Vec<String>;

/// The modules of a crate that are files of their own and no tests.
fn modules(name: &str) -> BTreeMap<ModulePath, syn::File> {
    let src = root().join("crates").join(name).join("src");
    let mut found = BTreeMap::new();
    let entry = if src.join("lib.rs").exists() { src.join("lib.rs") } else { src.join("main.rs") };
    read_module(&entry, &src, Vec::new(), &mut found);
    found
}

/// Reads the module in `file`, whose submodules lie in `dir`, and those.
fn read_module(file: &Path, dir: &Path, path: ModulePath, found: &mut BTreeMap<ModulePath, syn::File>) {
    let text = fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    for item in &parsed.items {
        let Item::Mod(module) = item else { continue };
        if module.content.is_some() || is_test(&module.attrs) {
            continue;
        }
        let name = module.ident.to_string();
        let (flat, nested) = (dir.join(format!("{name}.rs")), dir.join(&name).join("mod.rs"));
        let child = if flat.exists() { flat } else { nested };
        read_module(&child, &dir.join(&name), [path.clone(), vec![name]].concat(), found);
    }
    found.insert(path, parsed);
}

fn is_test(attrs: &[Attribute]) -> bool {
    attrs.iter().any(|attr| {
        let text = match &attr.meta {
            syn::Meta::List(list) => list.tokens.to_string(),
            _ => String::new(),
        };
        attr.path().is_ident("cfg") && text.split(|c: char| !c.is_alphanumeric()).any(|word| word == "test")
    })
}

/// The paths that code names, each as its segments.
#[derive(Default)]
struct Paths(Vec<Vec<String>>);

impl Paths {
    fn of(file: &syn::File) -> Vec<Vec<String>> {
        let mut paths = Paths::default();
        paths.visit_file(file);
        paths.0
    }

    fn take(&mut self, before: &[String], tree: &UseTree) {
        let with = |name: String| [before, &[name]].concat();
        match tree {
            UseTree::Path(path) => self.take(&with(path.ident.to_string()), &path.tree),
            UseTree::Name(name) => self.0.push(with(name.ident.to_string())),
            UseTree::Rename(name) => self.0.push(with(name.ident.to_string())),
            UseTree::Glob(_) => self.0.push(before.to_vec()),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.take(before, tree)),
        }
    }
}

impl<'a> Visit<'a> for Paths {
    fn visit_item_use(&mut self, item: &'a ItemUse) {
        self.take(&[], &item.tree);
    }

    fn visit_path(&mut self, path: &'a syn::Path) {
        self.0.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        syn::visit::visit_path(self, path);
    }

    fn visit_item_mod(&mut self, module: &'a ItemMod) {
        if !is_test(&module.attrs) {
            syn::visit::visit_item_mod(self, module);
        }
    }
}

/// The module of its crate that a path leads to, if it leads to one, seen from the module `from`.
fn target(from: &ModulePath, path: &[String], known: &BTreeMap<ModulePath, syn::File>) -> Option<ModulePath> {
    let mut at = match path.first()?.as_str() {
        "crate" => Vec::new(),
        "self" => from.clone(),
        "super" => from[..from.len().checked_sub(1)?].to_vec(),
        _ => return None,
    };
    for segment in &path[1..] {
        if segment == "super" {
            at.pop()?;
            continue;
        }
        at.push(segment.clone());
        if !known.contains_key(&at) {
            at.pop();
            break;
        }
    }
    Some(at)
}

#[test]
fn modules_form_no_circle_but_with_their_own_submodules() {
    let mut found = Vec::new();
    for name in crates() {
        let modules = modules(&name);
        let mut arrows: BTreeMap<&ModulePath, BTreeSet<ModulePath>> = BTreeMap::new();
        for (from, file) in modules.iter().filter(|(path, _)| !path.is_empty()) {
            let to = Paths::of(file).into_iter().filter_map(|path| target(from, &path, &modules));
            // What the crate's root names, it names from its modules.
            arrows.insert(from, to.filter(|to| !to.is_empty() && to != from).collect());
        }
        let circles = circles(&arrows);
        let is_left = CIRCLES_LEFT.contains(&name.as_str());
        for circle in if is_left { Vec::new() } else { circles } {
            let is_below = |top: &&ModulePath| circle.iter().all(|module| module.starts_with(top));
            let names: Vec<String> = circle.iter().map(|module| module.join("::")).collect();
            if !circle.iter().any(|top| is_below(&top)) {
                found.push(format!("crate {name}: {}", names.join(", ")));
            }
        }
    }
    assert!(found.is_empty(), "modules import each other in a circle:\n{}", found.join("\n"));
}

/// The sets of modules that reach each other.
fn circles(arrows: &BTreeMap<&ModulePath, BTreeSet<ModulePath>>) -> Vec<BTreeSet<ModulePath>> {
    let reach = |from: &ModulePath| {
        let mut reached = BTreeSet::new();
        let mut next = vec![from.clone()];
        while let Some(at) = next.pop() {
            for to in arrows.get(&at).into_iter().flatten() {
                if reached.insert(to.clone()) {
                    next.push(to.clone());
                }
            }
        }
        reached
    };
    let reached: BTreeMap<&ModulePath, BTreeSet<ModulePath>> =
        arrows.keys().map(|from| (*from, reach(from))).collect();
    let in_circle = reached.iter().filter(|(from, to)| to.contains(**from));
    let circle =
        in_circle.map(|(from, to)| to.iter().filter(|to| reached[*to].contains(*from)).cloned().collect());
    let distinct: BTreeSet<BTreeSet<ModulePath>> = circle.collect();
    distinct.into_iter().collect()
}

/// Counts the methods of types, in all their `impl` blocks that are of no trait.
#[derive(Default)]
struct Methods(BTreeMap<String, usize>);

impl<'a> Visit<'a> for Methods {
    fn visit_item_impl(&mut self, block: &'a ItemImpl) {
        let syn::Type::Path(of) = &*block.self_ty else { return };
        if block.trait_.is_some() {
            return;
        }
        let name = of.path.segments.last().expect("a type has a name").ident.to_string();
        let is_method = |item: &&ImplItem| matches!(item, ImplItem::Fn(method) if !is_test(&method.attrs));
        let count = block.items.iter().filter(is_method).count();
        *self.0.entry(name).or_default() += count;
    }

    fn visit_item_mod(&mut self, module: &'a ItemMod) {
        if !is_test(&module.attrs) {
            syn::visit::visit_item_mod(self, module);
        }
    }
}

#[test]
fn no_type_of_the_daemons_has_too_many_methods() {
    let mut found = Vec::new();
    for name in DAEMONS {
        // Of types that have the same name, private ones may be counted together.
        let mut methods = Methods::default();
        modules(name).values().for_each(|file| methods.visit_file(file));
        assert!(!methods.0.is_empty(), "the types of {name} were not found");
        let many = methods.0.into_iter().filter(|(_, count)| *count > METHODS_MAX);
        found.extend(many.map(|(of, count)| format!("{name}::{of} has {count}")));
    }
    assert!(found.is_empty(), "types have more than {METHODS_MAX} methods:\n{}", found.join("\n"));
}

#[test]
fn crates_do_not_know_the_parts_of_std_that_they_must_not_know() {
    let mut found = BTreeSet::new();
    for (name, forbidden) in STD_MUST_NOT_USE {
        for (module, file) in modules(name) {
            for path in Paths::of(&file) {
                let path = path.join("::");
                let is_under = |part: &&&str| {
                    let part = format!("std::{part}");
                    path == part || path.starts_with(&format!("{part}::"))
                };
                if let Some(part) = forbidden.iter().find(is_under) {
                    found.insert(format!("{name}::{} knows std::{part}", module.join("::")));
                }
            }
        }
    }
    let found: Vec<String> = found.into_iter().collect();
    assert!(found.is_empty(), "crates know what they must not:\n{}", found.join("\n"));
}

/// What stands between backquotes in a document.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Whether a text is the name of a type, or of something in it.
fn is_symbol(text: &str) -> bool {
    let is_name = |name: &str| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    text.starts_with(|c: char| c.is_ascii_uppercase())
        && text.split("::").all(is_name)
        && text.contains(|c: char| c.is_ascii_lowercase())
}

#[test]
fn files_and_symbols_that_documents_name_exist() {
    let files = ["crates", "xtask"].into_iter().flat_map(rust_files);
    let code: String = files.map(|file| fs::read_to_string(file).expect("a source file")).collect();
    let words: BTreeSet<&str> = code
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| !word.is_empty())
        .collect();
    let mut missing = Vec::new();
    for document in ["ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let text = fs::read_to_string(root().join(document)).expect("a document");
        for quoted in quoted(&text) {
            let is_path =
                quoted.contains('/') && !quoted.contains(|c: char| c.is_whitespace() || "*<{:".contains(c));
            let is_gone = if is_path {
                let path = quoted.trim_end_matches('/');
                !path.starts_with('/') && !path.starts_with('.') && !root().join(path).exists()
            } else {
                is_symbol(quoted) && !quoted.split("::").all(|name| words.contains(name))
            };
            if is_gone {
                missing.push(format!("{document} names `{quoted}`"));
            }
        }
    }
    assert!(missing.is_empty(), "documents name what is not there:\n{}", missing.join("\n"));
}

/// Words and turns that are not used any more, and what to say instead. Identifiers are held by the compiler; these are
/// for sentences.
const RETIRED: &[(&str, &str)] = &[
    ("is no valid", "is not a valid"),
    ("leaves from the leaves up", "drains bottom-up"),
    ("what a power cut at that moment", "crash-consistent"),
    ("what a power cut would leave", "crash-consistent"),
    ("number of the machine's present run", "the kernel's boot ID"),
    ("gets all of an image onto", "copies the whole image into the cache of"),
    ("absorb", "commit"),
    ("chunk journey", "fetch task"),
    ("watcheddisk", "MeteredDisk"),
    ("exportsocket", "NbdSocket"),
    ("keepwarm", "IdleTimeout"),
    ("farewell", "bye"),
    ("passing image", "transfer image"),
    ("god object", "name its owner"),
];

#[test]
fn retired_words_are_not_used() {
    let mut found = Vec::new();
    let mut dirs = vec![root().join("crates"), root().join("docs"), root().join("xtask/src")];
    let mut files =
        vec![root().join("README.md"), root().join("ARCHITECTURE.md"), root().join("CONTRIBUTING.md")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            match path.extension().and_then(|extension| extension.to_str()) {
                _ if path.is_dir() => dirs.push(path),
                Some("rs" | "md") => files.push(path),
                _ => {}
            }
        }
    }
    for file in files {
        let text = fs::read_to_string(&file).expect("a text file");
        for (number, line) in text.lines().enumerate() {
            let lower = line.to_lowercase();
            for (retired, instead) in RETIRED.iter().filter(|(retired, _)| lower.contains(retired)) {
                let at = file.strip_prefix(root()).expect("it lies in the workspace").display();
                found.push(format!("{at}:{}: '{retired}': say '{instead}'", number + 1));
            }
        }
    }
    assert!(found.is_empty(), "retired words:\n{}", found.join("\n"));
}
