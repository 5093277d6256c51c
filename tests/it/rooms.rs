//! The arrows between the rooms: who may know whom, read from the `use`
//! lines. The crates keep the great ones; this keeps those inside a crate.

use std::path::Path;

/// A room, and what it must not know.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("core/src/domain", &["crate::store", "crate::engine", "sqlx", "tokio"]),
    ("core/src/store", &["crate::engine"]),
    ("workers/src/handlers", &["sqlx", "crate::runtime"]),
    ("workers/src/agent", &["sqlx", "crate::runtime"]),
    ("workers/src/tools", &["sqlx", "crate::runtime", "crate::adapters"]),
    ("workers/src/adapters", &["sqlx", "crate::runtime", "crate::tools"]),
    ("workers/src/egress.rs", &["sqlx", "crate::"]),
    ("src/api", &["crate::dev", "crate::bench", "capx_workers", "sqlx::query"]),
    ("src/dev", &["crate::bench"]),
    ("src/cli", &["capx_core::store", "capx_core::engine", "capx_workers", "crate::api", "crate::dev", "sqlx"]),
];
/// SQL lives in the store (and, as the yardstick's own, in the bench).
const SQL_ROOMS: &[&str] = &["core/src/store", "src/bench"];

fn files(path: &Path, found: &mut Vec<std::path::PathBuf>) {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).unwrap().flatten() {
            files(&entry.path(), found);
        }
    } else if path.extension().is_some_and(|e| e == "rs") {
        found.push(path.to_owned());
    }
}

#[test]
fn each_room_knows_only_what_it_may() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut broken = Vec::new();
    for (room, forbidden) in FORBIDDEN {
        let mut found = Vec::new();
        files(&root.join(room), &mut found);
        assert!(!found.is_empty(), "there is no room {room}");
        for file in found {
            let text = std::fs::read_to_string(&file).unwrap();
            // What stands after the tests' line is a test's business.
            let code = text.split("#[cfg(test)]").next().unwrap_or_default();
            for line in code.lines().filter(|line| !line.trim_start().starts_with("//")) {
                for word in forbidden.iter().filter(|word| line.contains(**word)) {
                    broken.push(format!("{} knows `{word}`: {}", file.display(), line.trim()));
                }
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn sql_lives_in_the_store() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    for room in ["src", "core/src", "workers/src"] {
        files(&root.join(room), &mut found);
    }
    let broken: Vec<String> = found
        .iter()
        .filter(|file| !SQL_ROOMS.iter().any(|room| file.starts_with(root.join(room))))
        .filter(|file| {
            let text = std::fs::read_to_string(file).unwrap();
            ["sqlx::query", "query_file!", "query_scalar!"].iter().any(|word| text.contains(word))
        })
        // The one statement of the sender of hints belongs to its connection.
        .filter(|file| !file.ends_with("engine/wake.rs"))
        .map(|file| file.display().to_string())
        .collect();
    assert!(broken.is_empty(), "SQL outside of the store: {}", broken.join(", "));
}
