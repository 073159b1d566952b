//! The command as its user sees it: what it prints, where, and how it exits.

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const COMMAND: &str = env!("CARGO_BIN_EXE_gpusvm");

fn gpusvm(args: &[&str]) -> Output {
    Command::new(COMMAND)
        .args(args)
        .output()
        .expect("the command starts")
}

/// Runs a workload that must be verified; all of standard output is the JSON object.
fn run(args: &[&str]) -> Value {
    let output = gpusvm(&[&["run", "--json"], args].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(report["verified"], true, "{report:#}");
    assert_eq!(report["ranges_live"], 0, "{report:#}");
    assert_eq!(report["vram_used_bytes_at_exit"], 0, "{report:#}");
    for direction in ["to_device", "to_ram"] {
        let by_cause = report[direction]["bytes_by_cause"]
            .as_object()
            .expect("a map");
        let sum: u64 = by_cause.values().filter_map(Value::as_u64).sum();
        assert_eq!(report[format!("{direction}_bytes")], sum, "{report:#}");
    }
    report
}

fn number(report: &Value, key: &str) -> u64 {
    report[key]
        .as_u64()
        .unwrap_or_else(|| panic!("{key} in {report:#}"))
}

/// A file of this test.
fn file(name: &str, content: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, content).expect("a directory for tests");
    path
}

#[test]
fn bfs_larger_than_vram() {
    let report = run(&["bfs", "--scale", "15", "--vram", "4M", "--units", "2"]);
    assert_eq!(report["workload"], "bfs");
    assert_eq!(report["vram_bytes"], 4 << 20);
    assert!(
        number(&report, "working_set_bytes") > 3 * (4 << 20),
        "{report:#}"
    );
    for counter in [
        "device_faults",
        "cpu_faults",
        "evictions",
        "to_device_bytes",
        "to_ram_bytes",
    ] {
        assert!(number(&report, counter) > 0, "{counter} in {report:#}");
    }
    assert!(report["elapsed_s"].as_f64().unwrap() > 0.0);
    assert_eq!(report["result"]["edges"], 16 << 15);
}

#[test]
fn bfs_in_one_block_of_vram() {
    let report = run(&["bfs", "--scale", "8", "--vram", "2M", "--units", "2"]);
    assert_eq!(report["vram_bytes"], 2 << 20);
}

#[test]
fn one_seed_one_result() {
    let result = |seed| {
        let report = run(&["bfs", "--scale", "9", "--seed", seed]);
        ["root", "reached", "levels", "edges_traversed"].map(|key| number(&report["result"], key))
    };
    assert_eq!(result("5"), result("5"));
    assert_ne!(result("5"), result("6"));
}

/// The same graph in both formats: a path of four vertices, an edge apart, a loop.
#[test]
fn bfs_on_files() {
    const MTX: &str = "%%MatrixMarket matrix coordinate pattern symmetric\n\
                       % a path\n7 7 5\n2 1\n3 2\n4 3\n6 5\n7 7\n";
    const SNAP: &str = "# a path\n10\t20\n20\t30\n30\t40\n50\t60\n70\t70\n";
    for (name, content) in [
        ("path.mtx", MTX),
        ("path.txt", SNAP),
        ("header-says-mtx.txt", MTX),
    ] {
        let path = file(name, content);
        let mut reached = Vec::new();
        for seed in ["1", "2", "3", "4", "5", "6"] {
            let report = run(&["bfs", "--graph", path.to_str().unwrap(), "--seed", seed]);
            assert_eq!(report["subject"], path.to_str().unwrap());
            assert_eq!(report["result"]["vertices"], 7);
            assert_eq!(report["result"]["edges"], 5);
            reached.push(number(&report["result"], "reached"));
        }
        assert!(reached.iter().all(|n| [2, 4].contains(n)), "{reached:?}");
    }
}

#[test]
fn triad_larger_than_vram() {
    let report = run(&[
        "triad",
        "--size",
        "12M",
        "--vram",
        "4M",
        "--iterations",
        "2",
    ]);
    assert_eq!(report["workload"], "triad");
    assert_eq!(report["result"]["elements"], (12 << 20) / 24);
    assert!(number(&report, "evictions") > 0, "{report:#}");
}

#[test]
fn triad_of_one_element() {
    let report = run(&["triad", "--size", "24", "--iterations", "1"]);
    assert_eq!(report["working_set_bytes"], 24);
}

#[test]
fn histogram_of_a_program_and_of_one_byte() {
    let report = run(&["histogram", "--input", COMMAND, "--vram", "2M"]);
    assert_eq!(report["workload"], "histogram");
    assert_eq!(
        report["result"]["bytes"],
        fs::metadata(COMMAND).unwrap().len()
    );
    assert_eq!(report["result"]["distinct_bytes"], 256);
    let report = run(&[
        "histogram",
        "--input",
        file("one-byte", "x").to_str().unwrap(),
    ]);
    assert_eq!(report["result"]["distinct_bytes"], 1);
}

#[test]
fn report_for_people() {
    let output = gpusvm(&["run", "bfs", "--scale", "8"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(
        text.starts_with("bfs: Kronecker graph, scale 8, edge factor 16, seed 1\n"),
        "{text}"
    );
    for label in [
        "verified",
        "rung",
        "device faults",
        "CPU faults",
        "evictions",
        "to RAM",
    ] {
        assert!(text.contains(label), "{label} in {text}");
    }
}

#[test]
fn lowest_rung_on_request_and_never_silently() {
    let output = gpusvm(&["run", "bfs", "--scale", "10", "--rung", "4", "--json"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["rung"], 4, "{report:#}");
    assert_eq!(report["verified"], true, "{report:#}");
    assert!(
        stderr.starts_with("note: ") && stderr.trim_end().lines().count() == 1,
        "{stderr}"
    );
}

#[test]
fn userfaultfd_required_is_there_or_an_error() {
    let output = gpusvm(&["run", "bfs", "--scale", "8", "--require-uffd", "--json"]);
    match output.status.code() {
        Some(0) => {
            let report: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert!(number(&report, "rung") < 4, "{report:#}");
        }
        code => refused(&output, code, "userfaultfd"),
    }
}

#[test]
fn doctor_has_something_to_say() {
    let output = gpusvm(&["doctor"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(!output.stdout.is_empty());
}

/// Exit code 2, one sentence on standard error, nothing on standard output.
fn refused(output: &Output, code: Option<i32>, message: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(code, Some(2), "{message}: {stderr}");
    assert!(
        stderr.starts_with("error: ") && stderr.contains(message),
        "{message}: {stderr}"
    );
    assert!(!stderr.contains("panicked"), "{stderr}");
    assert!(output.stdout.is_empty());
}

#[test]
fn bad_input_is_refused() {
    let empty = file("empty", "");
    let empty = empty.to_str().unwrap();
    let cases: [(&[&str], &str); 20] = [
        (&["bfs", "--scale", "0"], "'0' for '--scale"),
        (&["bfs", "--scale", "60"], "'60' for '--scale"),
        (&["bfs", "--edge-factor", "0"], "'0' for '--edge-factor"),
        (
            &["bfs", "--scale", "31", "--edge-factor", "65536"],
            "of memory are available",
        ),
        (
            &["bfs", "--scale", "8", "--graph", "x"],
            "cannot be used with",
        ),
        (&["bfs", "--vram", "0"], "blocks of 2 MiB"),
        (&["bfs", "--vram", "1B"], "blocks of 2 MiB"),
        (&["bfs", "--vram", "lots"], "not a size such as 64M"),
        (&["bfs", "--vram", "10EiB"], "of memory are available"),
        (&["bfs", "--units", "0"], "'0' for '--units"),
        (&["bfs", "--rung", "5"], "'5' for '--rung"),
        (
            &["triad", "--size", "0"],
            "one element of each array takes 24 B",
        ),
        (&["triad", "--size", "10EiB"], "of memory are available"),
        (&["triad", "--vram", "6EiB"], "of memory are available"),
        (&["triad", "--iterations", "0"], "'0' for '--iterations"),
        (&["histogram"], "--input"),
        (
            &["histogram", "--input", "/no/such/file"],
            "cannot read /no/such/file: No such file",
        ),
        (&["histogram", "--input", "/"], "/ is not a regular file"),
        (
            &["histogram", "--input", "/dev/zero"],
            "/dev/zero is not a regular file",
        ),
        (
            &["histogram", "--input", empty],
            "is empty: there is nothing to count",
        ),
    ];
    for (args, message) in cases {
        let output = gpusvm(&[&["run"], args].concat());
        refused(&output, output.status.code(), message);
    }
}

#[test]
fn bad_graphs_are_refused_with_the_line() {
    const HEADER: &str = "%%MatrixMarket matrix coordinate pattern general\n";
    let cases = [
        (
            "a.mtx",
            "3 3 1\n".to_owned(),
            "a.mtx, line 1: expected the header",
        ),
        (
            "b.mtx",
            format!("{HEADER}3 4 1\n"),
            "b.mtx, line 2: the matrix has 3 rows",
        ),
        (
            "c.mtx",
            format!("{HEADER}3 3 1\n1 9\n"),
            "c.mtx, line 3: vertex 9 is outside 1..=3",
        ),
        (
            "d.mtx",
            format!("{HEADER}3 3 2\n1 2\n"),
            "d.mtx, line 3: the file ends after 1 of 2",
        ),
        (
            "e.mtx",
            format!("{HEADER}0 0 0\n"),
            "e.mtx has no edge between two vertices",
        ),
        (
            "f.txt",
            "1 2\n1 two\n".to_owned(),
            "f.txt, line 2: `two` is not a vertex id",
        ),
        ("g.txt", String::new(), "g.txt, line 1: the file ends"),
        (
            "i.mtx",
            format!("{HEADER}4294967295 4294967295 1\n1 2\n"),
            "of memory are available",
        ),
    ];
    for (name, content, message) in cases {
        let path = file(name, &content);
        let output = gpusvm(&["run", "bfs", "--graph", path.to_str().unwrap()]);
        refused(&output, output.status.code(), message);
    }
    for path in ["/", "/dev/zero", "/no/such/file"] {
        let output = gpusvm(&["run", "bfs", "--graph", path]);
        refused(&output, output.status.code(), path);
    }
}

/// That there is nothing but loops is only known when the device has counted.
#[test]
fn a_graph_of_loops_has_nothing_to_search() {
    let path = file("loops.txt", "1 1\n2 2\n");
    let output = gpusvm(&["run", "bfs", "--graph", path.to_str().unwrap()]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr.contains("loops.txt has no edge between two vertices"),
        "{stderr}"
    );
    assert!(output.stdout.is_empty());
}
