//! Families of processes: this program again, once for each engine, all at once.
//!
//! ```text
//!   parent                      child
//!   starts all   -------------> "ready"
//!   all are      <------------- waits for a line
//!   "go"         -------------> runs
//! ```

use crate::engine::ENGINES;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};

/// What a child is to run: the name of a test.
const WHAT: &str = "GPUSVM_MATRIX_CHILD";
/// What a child says when it waits for the others.
const HERE: &str = "here";

/// What this process is to run, if it is a child.
pub(crate) fn what() -> Option<String> {
    std::env::var(WHAT).ok()
}

/// In a child: waits until every child is here.
pub(crate) fn meet() {
    println!("{HERE}");
    let mut line = String::new();
    let read = std::io::stdin().read_line(&mut line).expect("a pipe");
    assert!(read > 0, "the parent is gone");
}

/// In the parent: runs `name` in a child for each engine. They meet `meetings` times.
pub(crate) fn run(name: &str, meetings: usize) {
    let mut children: Vec<_> = (0..ENGINES).map(|_| Running::start(name)).collect();
    for _ in 0..meetings {
        let here: Vec<bool> = children.iter_mut().map(Running::is_here).collect();
        if here.contains(&false) {
            break;
        }
        children.iter_mut().for_each(Running::go);
    }
    let ends: Vec<_> = children.into_iter().map(Running::end).collect();
    for end in ends {
        if let Err(output) = end {
            panic!("a child failed: {output}");
        }
    }
}

struct Running {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
    heard: String,
}

impl Running {
    fn start(name: &str) -> Self {
        let program = std::env::current_exe().expect("this program");
        let mut command = Command::new(program);
        command
            .env(WHAT, name)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().expect("a child");
        let output = BufReader::new(child.stdout.take().expect("its output"));
        Self {
            child,
            output,
            heard: String::new(),
        }
    }

    /// Reads until it waits for the others, or ends.
    fn is_here(&mut self) -> bool {
        let mut line = String::new();
        while self.output.read_line(&mut line).unwrap_or(0) > 0 {
            if line.trim() == HERE {
                return true;
            }
            self.heard.push_str(&line);
            line.clear();
        }
        false
    }

    fn go(&mut self) {
        let pipe = self.child.stdin.as_mut().expect("a pipe");
        // A child that has ended is heard of below.
        let _ = pipe.write_all(b"go\n").and_then(|()| pipe.flush());
    }

    fn end(mut self) -> Result<(), String> {
        drop(self.child.stdin.take());
        let _ = self.output.read_to_string(&mut self.heard);
        let status = self.child.wait().expect("a child");
        let heard = self.heard;
        if status.success() {
            Ok(())
        } else {
            Err(format!("{status}: {heard}"))
        }
    }
}
