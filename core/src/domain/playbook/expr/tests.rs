use proptest::prelude::*;
use serde_json::json;

use super::*;

struct Names(Value);

impl Scope for Names {
    fn lookup(&self, reference: &Reference) -> Option<(&Value, usize)> {
        self.0.get(reference.name(0)?).map(|value| (value, 1))
    }
}

fn scope() -> Names {
    Names(json!({
        "n": 3, "half": 0.5, "big": u64::MAX, "t": "Hello", "empty": "", "list": [1, 2.0, "x"], "none": null,
        "steps": {"compile-report": {"output": {"score": 0.7, "a b": [{"c": true}]}}},
    }))
}

fn eval(text: &str) -> Result<Value, String> {
    parse(text)?.eval(&scope(), &mut Budget::default()).map(Cow::into_owned).map_err(|error| error.to_string())
}

#[test]
fn says_what_is_written() {
    for (text, wanted) in [
        ("1 + 2 * 3", json!(7)),
        ("(1 + 2) * 3 - -4", json!(13)),
        ("7 / 2", json!(3.5)),
        ("8 / 2", json!(4)),
        ("7 % 4 == 3", json!(true)),
        ("-n + 1", json!(-2)),
        ("n-1 ?? 'a name'", json!("a name")),
        ("n - 1", json!(2)),
        ("half < n && n <= 3", json!(true)),
        ("not n == 3 or t == 'Hello'", json!(true)),
        ("!(n > 1) || false", json!(false)),
        ("1 == 1.0", json!(true)),
        ("[1, {}] == 1".replace("{}", "2").as_str(), json!(false)),
        ("9007199254740993 == 9007199254740992", json!(false)),
        ("big > 1 and big == 18446744073709551615", json!(true)),
        ("'a' in ['a', 'b'] and 'ell' in t and not ('z' in none)", json!(true)),
        ("steps.compile-report.output.score < 0.8", json!(true)),
        ("${steps.compile-report.output['a b'][0].c}", json!(true)),
        ("${ n } == 3 and {{ n }} == 3".replace("{{ n }}", "${n}").as_str(), json!(true)),
        ("{{ t | upper }}", json!("HELLO")),
        ("t | lower | replace('l', 'L') | len", json!(5)),
        ("list[n - 1]", json!("x")),
        ("missing ?? none ?? 'x'", json!("x")),
        ("default(missing.deep[3], 4) + len(list)", json!(7)),
        ("defined(missing) or defined(list[9])", json!(false)),
        ("'it''s' ?? 1".replace("''", "\\'").as_str(), json!("it's")),
        ("\"a\\nb\"", json!("a\nb")),
        ("join(split('a,b', ','), ' ') + '!'", json!("a b!")),
        ("first([5, 6]) + last([5, 6])", json!(11)),
        ("slice('Grüße', 1, -1)", json!("rüß")),
        ("slice(list, -2)", json!([2.0, "x"])),
        ("sum([1, 2, 3]) == 6 and min([3, 1]) == 1 and max(2, 5) == 5", json!(true)),
        ("round(2.5) + round(1.005, 2)", json!(4.0)),
        ("number(' 12 ') + number(true)", json!(13)),
        ("text([1]) + json('x')", json!("[1]\"x\"")),
        ("from_json('{\"a\": [1]}').a[0]", json!(1)),
        ("(keys(steps) + values(steps)) | len", json!(2)),
        ("pluck(from_json('[{\"a\": 1}, {}]'), 'a')", json!([1, null])),
        ("1e3 + -2.5e-1", json!(999.75)),
        ("starts_with(t, 'He') and ends_with(t, 'lo') and contains(list, 2)", json!(true)),
        ("trim('  x ')", json!("x")),
    ] {
        assert_eq!(eval(text), Ok(wanted), "{text}");
    }
}

#[test]
fn what_counts_as_true() {
    for (text, wanted) in [
        ("n", true),
        ("half", true),
        ("0", false),
        ("empty", false),
        ("none", false),
        ("[]", false),
        ("[0]", true),
        ("steps", true),
        ("none or t", true),
        ("'no'", true),
    ] {
        assert_eq!(parse(text).expect(text).holds(&scope(), &mut Budget::default()), Ok(wanted), "{text}");
    }
}

#[test]
fn says_what_is_wrong_with_it() {
    for (text, said) in [
        ("", "ends too early"),
        ("1 +", "ends too early"),
        ("n = 3", "write `==`"),
        ("n === 3", "write `==`"),
        ("1 < 2 < 3", "join them by `and`"),
        ("(1", "ends too early"),
        ("1)", "unexpected `)`"),
        ("'abc", "no closing quote"),
        ("1_000", "`1_000` is no number"),
        ("1e999", "no number"),
        ("012", "`012` is no number"),
        ("uper(t)", "did you mean `upper`?"),
        ("foo(t)", "the functions are defined, default"),
        ("len()", "`len` is written len(x)"),
        ("n == not t", "in front of the comparison"),
        ("missing", "`missing` is not defined"),
        ("list[7]", "`list[7]` is not defined"),
        ("steps['compile-report'].outputs", "`steps.compile-report.outputs` is not defined"),
        ("t < 3", "text cannot be compared with a number"),
        ("t + 3", "use text(x)"),
        ("list * 2", "cannot calculate with a list"),
        ("1 / 0", "division by zero"),
        ("big * big", "too large"),
        ("1e308 * 10", "too large"),
        ("len(3)", "len(x) takes text, a list or a map, not a number"),
        ("first([])", "not defined"),
        ("from_json('{')", "no JSON"),
        ("(a+)+$", "unexpected `)+$`"),
        ("import('os')", "there is no function `import`"),
        ("__class__", "`__class__` is not defined"),
        ("-not n", "in front of the comparison"),
        ("from_json('\"a\\\\u0000\"')", "NUL"),
        ("t.constructor", "`t.constructor` is not defined"),
    ] {
        let error = eval(text).expect_err(text);
        assert!(error.contains(said), "{text}: {error}");
    }
}

/// Whatever is given, the stack holds, and what is made is bounded.
#[test]
fn no_text_is_too_much() {
    for text in [
        "(".repeat(3_000),
        "!".repeat(30_000),
        "-".repeat(30_000),
        "[".repeat(100_000),
        "not ".repeat(30_000),
        format!("n{}", "[0]".repeat(10_000)),
        format!("list{}", "[n]".repeat(10_000)),
        format!("n{}", ".a".repeat(10_000)),
        vec!["1"; 10_000].join(" + "),
        format!("t{}", " | upper".repeat(10_000)),
        "${".repeat(5_000),
        format!("{}n", "len(".repeat(5_000)),
        format!("{}1", "1 ?? ".repeat(2_000)),
    ] {
        let error = eval(&text).expect_err(&text[..10]);
        assert!(["deeper than", "more than"].iter().any(|said| error.contains(said)), "{}: {error}", &text[..10]);
    }
    // What grows is bounded by what it may make.
    let mut doubling = String::from("'0123456789abcdef'");
    for _ in 0..40 {
        doubling = format!("replace({doubling}, '0', '00')");
    }
    assert!(eval(&doubling).is_err());
    let mut text = String::from("'xxxxxxxxxxxxxxxx'");
    for _ in 0..12 {
        text = format!("replace({text}, 'x', 'xxxxxxxx')");
    }
    assert!(eval(&text).expect_err("too large").contains("larger than"));
}

#[test]
fn knows_what_it_refers_to() {
    let expr = parse("steps.a.output[0] == inputs['x y'] and len(item.z) > n").expect("parses");
    let names: Vec<String> = expr.references().iter().map(ToString::to_string).collect();
    assert_eq!(names, ["steps.a.output[0]", "inputs['x y']", "item.z", "n"]);
    assert_eq!(parse_reference("a.b[2].c-d").map(|r| r.to_string()), Ok("a.b[2].c-d".into()));
    assert!(parse_reference("a + b").is_err());
}

proptest! {
    #[test]
    fn any_text_parses_or_says_why(text in ".*") {
        let _ = eval(&text);
    }

    #[test]
    fn anything_of_its_words_gives_a_value_or_says_why(
        words in prop::collection::vec(prop::sample::select(vec![
            "(", ")", "[", "]", "1", "2.5", "'x'", "n", "t", "list", ".", "+", "-", "*", "/", "%", "==", "<", "and",
            "or", "not", "!", "|", "len", "upper", "slice", ",", "??", "in", "missing", "null", "min", "sum", "-3",
        ]), 0..40),
        spaced: bool,
    ) {
        let _ = eval(&words.join(if spaced { " " } else { "" }));
    }

    /// Numbers are what they are worth, and order is total among them.
    #[test]
    fn comparisons_agree_with_one_another(a in any::<i64>(), b in any::<i64>()) {
        let holds = |op: &str| eval(&format!("({a}) {op} ({b})"));
        prop_assert_eq!(holds("<"), Ok(json!(a < b)));
        prop_assert_eq!(holds(">="), Ok(json!(a >= b)));
        prop_assert_eq!(holds("=="), Ok(json!(a == b)));
        prop_assert_eq!(holds("!="), Ok(json!(a != b)));
        if let Some(sum) = a.checked_add(b) {
            prop_assert_eq!(holds("+"), Ok(json!(sum)));
        }
    }
}

/// What the parser lets pass, every thread can carry, and in bounded time.
#[test]
fn what_is_allowed_is_evaluated_on_a_small_stack() {
    let large = json!({"x": "y".repeat(1_000_000), "n": 1, "t": "a"});
    let texts = [
        vec!["1"; 127].join(" + "),
        format!("t{}", " | upper".repeat(126)),
        vec!["n"; 127].join(" ?? "),
        format!("{}1{}", "(".repeat(60), ")".repeat(60)),
        format!("{}n", "not ".repeat(60)),
    ];
    let run = move || {
        for text in texts {
            let expr = parse(&text).expect(&text[..10]);
            let found = expr.eval(&Names(large.clone()), &mut Budget::default()).map(Cow::into_owned);
            assert!(found.is_ok(), "{}: {found:?}", &text[..10]);
            assert_eq!(expr.clone(), expr);
            let _ = expr.references();
        }
        // Reading costs, too; and a list of one large value is refused before it
        // is made.
        let much = vec!["len(x)"; 100].join(" + ");
        assert_eq!(
            parse(&much).expect("parses").eval(&Names(large.clone()), &mut Budget::default()),
            Err(EvalError::Long)
        );
        let list = format!("[{}]", vec!["x"; 990].join(", "));
        let made = parse(&list).expect("parses").eval(&Names(large), &mut Budget::default()).map(Cow::into_owned);
        assert!(matches!(made, Err(EvalError::Large(_))));
    };
    std::thread::Builder::new().stack_size(2 * 1024 * 1024).spawn(run).expect("a thread").join().expect("no overflow");
}
