//! The client as people and programs use it.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn capx(arguments: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_capx"))
        .args(arguments)
        .env("NO_COLOR", "1")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may stop reading before the end.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

const BROKEN: &str = "name: x
steps:
  - id: draft
    role: writer
    action: write
    timout: 5s
  - {goto: drat, max_retries: 2}
";

#[test]
fn a_playbook_is_checked_without_a_server() {
    let all: Vec<String> =
        std::fs::read_dir("playbooks").unwrap().map(|e| e.unwrap().path().display().to_string()).collect();
    let mut arguments = vec!["playbook", "check"];
    arguments.extend(all.iter().map(String::as_str));
    let good = capx(&arguments, "");
    assert!(good.status.success(), "{}", text(&good.stdout));
    assert_eq!(text(&good.stdout).lines().filter(|line| line.starts_with("ok ")).count(), all.len());

    let bad = capx(&["playbook", "check", "-"], BROKEN);
    assert_eq!(bad.status.code(), Some(1));
    let wanted = "error: steps.0.timout: unknown key `timout`
  --> stdin:6:5
  6 |     timout: 5s
    |     ^
  help: did you mean `timeout`?

error: steps.1.goto: there is no step `drat`
  --> stdin:7:12
  7 |   - {goto: drat, max_retries: 2}
    |            ^
  help: did you mean `draft`?

";
    assert_eq!(text(&bad.stdout), wanted);
    assert_eq!(text(&bad.stderr), "capx: stdin is not in order\n");

    let told = capx(&["playbook", "check", "--json", "-", "playbooks/hello.yml"], BROKEN);
    assert_eq!(told.status.code(), Some(1));
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    assert_eq!(
        (&told[0]["valid"], &told[1]["valid"], &told[1]["name"]),
        (&false.into(), &true.into(), &"hello".into())
    );
    let problem = &told[0]["problems"][0];
    assert_eq!(
        (&problem["line"], &problem["column"], &problem["path"]),
        (&6.into(), &5.into(), &"steps.0.timout".into())
    );
}

#[test]
fn what_is_no_playbook_is_said_and_not_read_on() {
    for (arguments, input, said) in [
        (["playbook", "check", "nowhere.yml"], "".to_owned(), "nowhere.yml cannot be read: No such file"),
        (["playbook", "check", "src"], "".into(), "src cannot be read"),
        (["playbook", "check", "-"], "x".repeat(300_000), "stdin is not in order"),
    ] {
        let output = capx(&arguments, &input);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(text(&output.stderr).contains(said), "{}", text(&output.stderr));
    }
    let usage = capx(&["playbook", "check"], "");
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn playbooks_are_written_in_one_form_or_left_alone() {
    let directory = crate::harness::scratch().join("fmt");
    std::fs::create_dir_all(&directory).unwrap();
    let path = |name: &str| directory.join(name).display().to_string();
    let written = "playbook: x # mine\nsteps: [{tool: transform}]\n";
    let wanted = "name: x # mine\nsteps:\n  - id: transform\n    action: transform\n";
    let (good, bad, link) = (path("good.yml"), path("bad.yml"), path("link.yml"));
    std::fs::write(&good, written).unwrap();
    std::fs::write(&bad, "nam: x\n").unwrap();
    std::os::unix::fs::symlink(&good, &link).unwrap();
    let checked = capx(&["playbook", "fmt", "--check", &link], "");
    assert_eq!((checked.status.code(), text(&checked.stdout)), (Some(1), format!("differs {link}\n").as_str()));
    assert_eq!(std::fs::read_to_string(&good).unwrap(), written, "a check changed it");
    let formatted = capx(&["playbook", "fmt", &bad, &link], "");
    assert_eq!(formatted.status.code(), Some(1));
    assert!(text(&formatted.stderr).contains("1 of 2 playbooks are not in order"), "{}", text(&formatted.stderr));
    assert!(text(&formatted.stderr).contains("unknown key `nam`"), "{}", text(&formatted.stderr));
    assert!(!text(&formatted.stdout).contains("nam"), "a problem is no data");
    assert_eq!(std::fs::read_to_string(&good).unwrap(), wanted);
    assert_eq!(std::fs::read_to_string(&bad).unwrap(), "nam: x\n");
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    let again = capx(&["playbook", "fmt", &good], "");
    assert_eq!((again.status.code(), text(&again.stdout)), (Some(0), ""));
    assert_eq!(text(&capx(&["playbook", "fmt", "-"], written).stdout), wanted);
    // The ones that authors copy are as they should be.
    let all: Vec<String> =
        std::fs::read_dir("playbooks").unwrap().map(|e| e.unwrap().path().display().to_string()).collect();
    let mut arguments = vec!["playbook", "fmt", "--check"];
    arguments.extend(all.iter().map(String::as_str));
    let all = capx(&arguments, "");
    assert!(all.status.success(), "{}", text(&all.stdout));
}

/// Each broken playbook beside what is said of it. `CAPX_WRITE_GOLDEN=1` writes
/// that anew, to be read before it is committed.
#[test]
fn what_is_wrong_is_said_as_it_was_reviewed() {
    let mut broken: Vec<_> = std::fs::read_dir("tests/broken")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "yml"))
        .collect();
    broken.sort();
    assert!(broken.len() >= 60);
    let mut differ = Vec::new();
    for file in broken {
        let output = capx(&["playbook", "check", file.to_str().unwrap()], "");
        assert_eq!(output.status.code(), Some(1), "{}", file.display());
        let golden = file.with_extension("txt");
        if std::env::var("CAPX_WRITE_GOLDEN").is_ok() {
            std::fs::write(&golden, &output.stdout).unwrap();
        }
        if std::fs::read_to_string(&golden).unwrap_or_default() != text(&output.stdout) {
            differ.push(format!("{}:\n{}", golden.display(), text(&output.stdout)));
        }
    }
    assert!(differ.is_empty(), "{}", differ.join("\n"));
}

#[test]
fn the_schema_for_editors_knows_what_the_check_knows_of_shapes() {
    let printed = capx(&["playbook", "schema"], "");
    let schema: Value = serde_json::from_slice(&printed.stdout).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let yaml = |text: &str| capx_core::domain::playbook::yaml::read(text).map(|node| node.to_json());
    for entry in std::fs::read_dir("playbooks").unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let errors: Vec<String> =
            validator.iter_errors(&yaml(&text).unwrap()).map(|e| format!("{}: {e}", e.instance_path())).collect();
        assert!(errors.is_empty(), "{}: {errors:?}", path.display());
    }
    // What is wrong by its shape is wrong in an editor, too.
    for name in [
        "key-unknown-step",
        "key-unknown-top",
        "key-unknown-retry",
        "key-unknown-trigger",
        "params-a-list",
        "timeout-a-number",
        "steps-a-map",
        "input-unknown-type",
        "name-missing",
    ] {
        let text = std::fs::read_to_string(format!("tests/broken/{name}.yml")).unwrap();
        assert!(!validator.is_valid(&yaml(&text).unwrap()), "{name}");
    }
}
