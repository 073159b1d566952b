//! Which crate may depend on which: the arrows of ARCHITECTURE.md.

use cargo_metadata::{DependencyKind, MetadataCommand, Package};
use gpusvm_tidy::assert_none;
use gpusvm_tidy::tree::Tree;

/// Each crate, and which of ours it may use. Tests of a crate may use any.
const ARROWS: &[(&str, &[&str])] = &[
    // L0: words, locks, guarded accesses.
    ("gpusvm-types", &[]),
    ("gpusvm-sync", &[]),
    ("gpusvm-guarded", &[]),
    // L1: two contracts that do not know each other.
    ("gpusvm-mm", &["gpusvm-types", "gpusvm-sync"]),
    ("gpusvm-device", &["gpusvm-types", "gpusvm-sync"]),
    // L2 and L3: migration, then ranges. Neither knows a device.
    (
        "gpusvm-pagemap",
        &["gpusvm-types", "gpusvm-sync", "gpusvm-mm"],
    ),
    (
        "gpusvm-svm",
        &["gpusvm-types", "gpusvm-sync", "gpusvm-mm", "gpusvm-pagemap"],
    ),
    // A world implements mm and knows no device; a device implements device and knows no world.
    (
        "gpusvm-mm-linux",
        &["gpusvm-types", "gpusvm-sync", "gpusvm-mm", "gpusvm-guarded"],
    ),
    (
        "gpusvm-mm-sim",
        &["gpusvm-types", "gpusvm-sync", "gpusvm-mm"],
    ),
    (
        "gpusvm-softgpu",
        &[
            "gpusvm-types",
            "gpusvm-sync",
            "gpusvm-device",
            "gpusvm-guarded",
        ],
    ),
    // L4 and L5: here worlds and devices meet.
    (
        "gpusvm",
        &[
            "gpusvm-types",
            "gpusvm-sync",
            "gpusvm-mm",
            "gpusvm-device",
            "gpusvm-pagemap",
            "gpusvm-svm",
            "gpusvm-guarded",
            "gpusvm-mm-linux",
            "gpusvm-softgpu",
        ],
    ),
    ("gpusvm-cli", &["gpusvm"]),
    // A program of its own, in other programs: it copies to and from what they name.
    ("gpusvm-hmm-preload", &["gpusvm", "gpusvm-guarded"]),
    // What is done to the workspace itself.
    ("xtask", &[]),
    // For tests.
    (
        "gpusvm-testkit",
        &[
            "gpusvm-types",
            "gpusvm-sync",
            "gpusvm-mm",
            "gpusvm-device",
            "gpusvm-pagemap",
            "gpusvm-svm",
            "gpusvm-guarded",
            "gpusvm-mm-linux",
            "gpusvm-mm-sim",
            "gpusvm-softgpu",
            "gpusvm",
        ],
    ),
    ("gpusvm-tidy", &[]),
];

/// The layers that another kernel could host, and the only crate of others that they use.
const CORE: &[&str] = &[
    "gpusvm-types",
    "gpusvm-mm",
    "gpusvm-device",
    "gpusvm-pagemap",
    "gpusvm-svm",
];
const CORE_MAY_USE: &str = "thiserror";

fn packages() -> Vec<Package> {
    let manifest = gpusvm_tidy::tree::root().join("Cargo.toml");
    let metadata = MetadataCommand::new()
        .manifest_path(manifest)
        .no_deps()
        .exec();
    metadata.expect("cargo describes the workspace").packages
}

/// What a package uses outside of its tests.
fn uses(package: &Package) -> Vec<&str> {
    let outside = |kind| kind != DependencyKind::Development;
    let used = package
        .dependencies
        .iter()
        .filter(|dependency| outside(dependency.kind));
    used.map(|dependency| dependency.name.as_str()).collect()
}

fn is_ours(name: &str) -> bool {
    name == "gpusvm" || name.starts_with("gpusvm-")
}

#[test]
fn arrows_only_go_where_the_layers_allow() {
    let mut findings = Vec::new();
    for package in packages() {
        let name = package.name.as_str();
        let Some((_, allowed)) = ARROWS.iter().find(|(known, _)| *known == name) else {
            findings.push(format!(
                "{name}: which layer is it? give it a row in ARROWS"
            ));
            continue;
        };
        let ours = uses(&package).into_iter().filter(|used| is_ours(used));
        let bad = ours.filter(|used| !allowed.contains(used));
        findings.extend(bad.map(|used| format!("{name} -> {used}")));
    }
    assert_none(
        "an arrow between crates that the layers do not have",
        &findings,
    );
}

#[test]
fn only_tests_use_testkit_and_nobody_uses_tidy() {
    let mut findings = Vec::new();
    for package in packages() {
        let used = uses(&package);
        let tidy = package
            .dependencies
            .iter()
            .any(|used| used.name == "gpusvm-tidy");
        if used.contains(&"gpusvm-testkit") || tidy {
            findings.push(package.name.to_string());
        }
    }
    assert_none("a product that depends on what is for tests", &findings);
}

#[test]
fn core_layers_use_no_crates_of_others() {
    let core = packages()
        .into_iter()
        .filter(|package| CORE.contains(&package.name.as_str()));
    let mut findings = Vec::new();
    for package in core {
        let others = uses(&package)
            .into_iter()
            .filter(|used| !is_ours(used) && *used != CORE_MAY_USE);
        findings.extend(others.map(|used| format!("{} -> {used}", package.name)));
    }
    assert_none(
        "a core layer uses what another kernel would not have",
        &findings,
    );
}

#[test]
fn every_dependency_has_its_reason_in_contributing() {
    let tree = Tree::read();
    let page = tree
        .file("CONTRIBUTING.md")
        .map(|page| page.text.as_str())
        .unwrap_or_default();
    let mut findings = Vec::new();
    for package in packages() {
        let others = package
            .dependencies
            .iter()
            .filter(|used| !is_ours(&used.name));
        let missing = others.filter(|used| !page.contains(&format!("| `{}` |", used.name)));
        findings.extend(missing.map(|used| format!("{} of {}", used.name, package.name)));
    }
    findings.sort();
    findings.dedup();
    assert_none("a dependency without a row in CONTRIBUTING.md", &findings);
}
