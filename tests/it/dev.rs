//! `capx dev` ends promptly and in order whenever it is told to.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{eventually, scratch};

/// Starts it, interrupts it once `sign` says so, and waits for its end.
async fn interrupted(data: &Path, failpoints: &str, sign: impl Fn(&str) -> bool) -> (Option<i32>, String) {
    let said = data.with_extension("said");
    let mut child = Command::new(env!("CARGO_BIN_EXE_capx"))
        .args(["dev", "--bind", "127.0.0.1:0", "--data-dir"])
        .arg(data)
        .env_remove("CAPX_DATABASE_URL")
        .env("TMPDIR", data.with_file_name("tmp"))
        .env("CAPX_FAILPOINTS", failpoints)
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(&said).unwrap())
        .stderr(std::fs::OpenOptions::new().append(true).open(&said).unwrap())
        .spawn()
        .unwrap();
    let read = || std::fs::read_to_string(&said).unwrap();
    eventually("the sign", || std::future::ready(sign(&read()))).await;
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    eventually("the end", || std::future::ready(child.try_wait().unwrap().is_some())).await;
    (child.wait().unwrap().code(), read())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interrupt_ends_it_in_order_at_any_time() {
    // Too long for sockets in it: they get a directory of their own.
    let data = scratch().join(format!("dev-{}", "x".repeat(80)));
    let sockets = data.with_file_name("tmp");
    std::fs::create_dir_all(&sockets).unwrap();
    std::fs::set_permissions(&sockets, std::fs::Permissions::from_mode(0o1777)).unwrap();
    let sockets = || std::fs::read_dir(&sockets).unwrap().count();
    let server = data.join("postgres/data/postmaster.pid");
    // In the middle of the first start, of the second one, of a demo that
    // gets nowhere, and when everything is up.
    let initializing = |_: &str| data.join("postgres/data.partial").exists();
    let starting = |_: &str| server.exists();
    let in_the_demo = |said: &str| said.contains("playbook.started");
    let up = |said: &str| said.contains("CAPX_API_URL=") && sockets() == 1;
    type Sign<'a> = &'a dyn Fn(&str) -> bool;
    for (sign, failpoints, wanted) in [
        (&initializing as Sign<'_>, "", 130),
        (&starting, "", 130),
        (&in_the_demo, "claim.before=fail", 130),
        (&up, "", 0),
    ] {
        let (code, said) = interrupted(&data, failpoints, sign).await;
        assert_eq!(code, Some(wanted), "{said}");
        assert!(!server.exists(), "the server was left behind:\n{said}");
        assert_eq!(sockets(), 0, "sockets were left behind:\n{said}");
        assert!(!data.join("dev.json").exists(), "{said}");
        assert_eq!(said.contains("stopped before everything was up"), wanted == 130, "{said}");
    }
}
