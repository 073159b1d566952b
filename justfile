# Short names for what is typed often. `just check` is what CI runs.

# Everything that must hold before a change goes in.
check:
    .ci/run

# The tests.
test *args:
    cargo test --workspace {{ args }}

# Formatting and lints.
lint:
    cargo fmt --all --check
    cargo clippy --workspace --all-targets -- -D warnings

# The documentation, private items included.
doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items

# The benchmarks.
bench *args:
    cargo bench --workspace --bench '*' {{ args }}

# The command: `just run bfs --vram 16M`.
run *args="bfs":
    cargo run --release -- run {{ args }}
