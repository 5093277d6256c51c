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

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_be_used_is_told_at_once() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let old = an_old_server().await;
    for (url, wanted) in [
        (format!("postgres://x:y@{nobody}/z"), "cannot reach the database; is it up"),
        (format!("postgres://x:y@{old}/z"), "the database is PostgreSQL 13; capx needs 15 or newer"),
        ("nonsense".to_owned(), "the database's address is not valid"),
    ] {
        let mut dev = Command::new(env!("CARGO_BIN_EXE_capx"));
        dev.args(["dev", "--bind", "127.0.0.1:0", "--database-url", &url, "--data-dir"]);
        dev.arg(scratch().join("dev-url")).stdin(Stdio::null());
        let output = tokio::task::block_in_place(|| dev.output()).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(wanted), "{said}");
    }
}

/// As much of a PostgreSQL 13 as tells its version.
async fn an_old_server() -> std::net::SocketAddr {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut asked = [0; 1024];
                // It wants TLS first, and then introduces itself.
                assert!(stream.read(&mut asked).await.unwrap() > 0);
                stream.write_all(b"N").await.unwrap();
                assert!(stream.read(&mut asked).await.unwrap() > 0);
                let version = b"server_version\x0013.9\0";
                let mut answer = b"R\0\0\0\x08\0\0\0\0S".to_vec();
                answer.extend(u32::try_from(version.len() + 4).unwrap().to_be_bytes());
                answer.extend(version);
                answer.extend(b"Z\0\0\0\x05I");
                stream.write_all(&answer).await.unwrap();
                let _ = stream.read(&mut asked).await;
            });
        }
    });
    address
}
