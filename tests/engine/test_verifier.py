"""The verifier: what it must accept, what it must not, that only one answer is ever accepted, and its time."""

import time

import pytest

from ril_engine import digits
from ril_engine.verifier import verify

RIGHT = [  # (response, reference)
    # numbers
    ("56", "56"),
    ("7.0", "7"),
    ("I see 7 and 8. 7*8=56. The answer is 56.", "56"),
    ("The picture shows 3 then 8, so it is 11.", "11"),
    ("-3", "-3"),
    ("The answer is \u22123.", "-3"),
    ("+4", "4"),
    ("1,234,567", "1234567"),
    ("1234567", "1,234,567"),
    ("1{,}234", "1234"),
    (".5", "0.50"),
    ("1.5e3", "1500"),
    (r"$1.5 \times 10^{3}$", "1500"),
    ("10^6", "1 million"),
    ("2.5 million people", "2500000"),
    ("1/2", "0.5"),
    (r"\frac{1}{2}", "1/2"),
    (r"-\dfrac{3}{4}", "-0.75"),
    ("1 1/2", "1.5"),
    (r"1\frac12", "3/2"),
    ("2\u00bd", "2.5"),
    ("0.3333333", "1/3"),
    ("3.14159265", "3.1415926"),
    ("答案是5。", "5"),
    # where the answer is
    (r"First 3, then \boxed{4}. So 5 are left.", "4"),
    (r"\boxed{1} no, \boxed{\frac{1}{\text{2}}}", "0.5"),
    (r"\boxed{x = 12}", "12"),
    ("The answer is 5, not 7", "5"),
    ("The answer is 5 because 2+3=5 and 5>4.", "5"),
    ("**Answer:** 12\nI counted 7 and 5.", "12"),
    ("Answer - 12", "12"),
    ("Answer -12", "-12"),
    ("The answer is 3. Wait. The answer is: 4", "4"),
    ("The answer to 3+4 is $7$.", "7"),
    ("The final answer is x = 3 + 4 = 7.", "7"),
    ("It is 5, not 7", "5"),
    # units
    ("12 cm", "12"),
    ("12", "12 cm"),
    ("1.5 m", "150 cm"),
    (r"The answer is 150\text{ cm}.", "1.5 m"),
    ("0.5 kg", "500 grams"),
    ("90 minutes", "1.5 h"),
    ("250 ml", "0.25 L"),
    ("3 m\u00b2", "30000 cm^2"),
    ("4 square meters", "4 m^2"),
    ("36 km/h", "10 m/s"),
    ("36 miles per hour", "36 mi/h"),
    (r"90^\circ", "90 degrees"),
    ("20 degrees Celsius", "20 °C"),
    ("50%", "50"),
    (r"50\%", "0.5"),
    ("0.5", "50 percent"),
    ("$5", "5"),
    ("$5.00", "5 dollars"),
    ("5 apples", "5 apples"),
    ("1 apple", "1 apples"),
    ("5", "5 apples"),
    # choices
    ("B", "B"),
    ("(b)", "B"),
    ("b.", "(B)"),
    ("The answer is (B) because A is too long.", "B"),
    ("B. Paris", "B"),
    ("B) Paris", "(B)"),
    ("Answer: B", "B"),
    ("Option B is correct.", "B"),
    ("The first is too long, so it is B.", "B"),
    (r"\boxed{\text{B}}", "B"),
    ("The answer is B, Paris.", "B"),
    ("I think B", "B"),
    # words
    ("Odd", "odd"),
    ("so it is odd.", "odd"),
    ("It is a cat.", "the cat"),
    ("The answer is the New York Times, as the title says.", "New York Times"),
    ("Answer: red, white and blue", "Red, white, and blue"),
    (r"\boxed{\text{Paris}}", "paris"),
    ("Dr. Smith", "Dr. Smith"),
    ("3 8", "3 8"),
    (r"\boxed{(3,\ 4)}", "(3, 4)"),
    ("x^2 + 1", "x^2+1"),
    ("3:45", "3:45"),
    ("twenty one", "twenty-one"),
    ("!", "!"),
    # yes and no
    ("Yes, the left one is larger.", "yes"),
    ("No.", "no"),
    ("The answer is yes, there is no doubt.", "Yes"),
]
WRONG = [
    # parts of a number, signs, nearness
    ("12", "2"),
    ("2", "12"),
    ("-3", "3"),
    ("3", "-3"),
    ("3.14", "3.1"),
    ("3.1", "3.14"),
    ("1000001", "1000000"),
    ("0.33333", "1/3"),
    ("3.1415", "3.14159"),
    ("1,234", "234"),
    ("1,234", "1"),
    ("1.2.3", "3"),
    ("3:45", "45"),
    ("3/4/2020", "2020"),
    ("3/4/2020", "0.75"),
    ("3:45", "3"),
    ("1.2.3", "1.2"),
    ("3,45", "3"),
    ("2^3", "2"),
    ("2π", "2"),
    ("5(x+1)", "5"),
    ("f(5)-3", "-3"),
    ("3/4", "3"),
    ("3/4", "4"),
    ("1 1/2", "0.5"),
    ("1e3", "1"),
    ("10^5", "5"),
    ("x^2", "2"),
    ("2x", "2"),
    ("2nd", "2"),
    (r"\boxed{2\sqrt{2}}", "2"),
    (r"\boxed{\frac{\pi}{2}}", "2"),
    ("1/0", "1"),
    ("seven", "7"),
    ("", "7"),
    ("5 million", "5"),
    # where the answer is not
    ("The answer is 5, not 7", "7"),
    ("It is 5, not 7", "7"),
    ("The answer is not 7.", "7"),
    ("The answer isn't 7", "7"),
    ("The answer is 3. Wait. The answer is: 4", "3"),
    ("The answer is 5 or 7.", "5"),
    ("The answer is 5 or 7.", "7"),
    ("The answer is 5, 6, 7", "5"),
    ("The answer is between 5 and 7.", "7"),
    ("The answer is less than 5", "5"),
    ("The answer is > 5", "5"),
    ("The answer is 5 + 2", "5"),
    ("The answer is - 5", "5"),
    (r"\boxed{5, 7}", "5"),
    (r"\boxed{4} so 5", "5"),
    (r"\boxed{}", "7"),
    ("56 or 57", "56"),
    ("The answer is unknown. I see 7", "7"),
    # units
    ("12 cm", "12 m"),
    ("12 cm", "12 kg"),
    ("1.5 m", "15 cm"),
    ("36 km/h", "36 m/s"),
    ("4 m", "4 m^2"),
    ("20 °C", "20 °F"),
    ("50%", "5"),
    ("5%", "0.5"),
    ("50%", "50 cm"),
    ("$5", "€5"),
    ("5 apples", "5 pears"),
    # choices
    ("A cat", "A"),
    ("a", "B"),
    ("A or B", "A"),
    ("A or B", "B"),
    ("(A) and (B)", "A"),
    ("(A) and (B)", "B"),
    ("The answer is not B.", "B"),
    ("The answer is (B) because A is too long.", "A"),
    ("I think so", "I"),
    ("Both", "B"),
    ("f(b)", "B"),
    ("A. Paris or B. London", "B"),
    ("", "B"),
    # words
    ("odd or even", "odd"),
    ("It is not odd.", "odd"),
    ("New York", "York"),
    ("C++", "C+"),
    ("3.5 apples or pears", "35 apples or pears"),
    ("x-2", "x+2"),
    ("[0, 1]", "(0, 1)"),
    ("3 45", "3:45"),
    ("x 2", "x-2"),
    ("Paris. It is London.", "Paris"),
    ("", "odd"),
    ("odd", "!"),
    ("?", "!"),
    # yes and no
    ("No. Yes, it is.", "yes"),
    ("Yes or no", "yes"),
    ("Yesterday", "yes"),
    ("There is no cat", "no"),
    ("The answer is no, yes would be wrong", "yes"),
]


@pytest.mark.parametrize(("response", "reference"), RIGHT)
def test_right(response, reference):
    assert verify(response, reference)


@pytest.mark.parametrize(("response", "reference"), WRONG)
def test_wrong(response, reference):
    assert not verify(response, reference)


def test_it_agrees_with_the_digits_task():
    """On all that its teachers and a terse student write, for right and for wrong answers."""
    lines = [line for line in digits.corpus() if line.rstrip(".")[-1].isdigit()]
    assert len(lines) == 3000  # 10 kinds x 100 pairs, bare and in two styles
    for number, line in enumerate(lines):
        own = line.rstrip(".").split()[-1]
        assert verify(line, own)
        for reference in {own, str(number % 82), f"-{own}" if own != "0" else "-1", f"1{own}", own[:1], "12"}:
            assert verify(line, reference) == (reference == own), (line, reference)


def test_both_digits_are_an_answer_too():
    """Perception asks for two numbers, which the last one alone does not decide."""
    for style in digits.STYLES:
        text = digits.reasoned_answer(digits.PERCEPTION, 3, 8, 2, 2, style)
        assert verify(text, "3 8")
        assert not verify(text, "8 3") and not verify(text, "3")


def test_one_answer_at_most():
    """Naming many answers must gain nothing."""
    responses = [response for response, _ in RIGHT + WRONG if "%" not in response]  # 50 % is 50 and 0.5
    numbers = [str(number) for number in range(-60, 60)]
    for response in [*responses, "1, 2, 3", "1 2 3", "1 or 2", "Answer: 1 Answer: 2", "The answer is 1 and 2."]:
        assert sum(verify(response, each) for each in numbers) <= 1, response
        assert sum(verify(response, each) for each in "ABCDEFGHIJ") <= 1, response
        assert sum(verify(response, each) for each in ("yes", "no")) <= 1, response


@pytest.mark.parametrize("reference", ["5", "B", "red car", "yes", "5 cm"])
@pytest.mark.parametrize(
    "unit",
    [
        "1",
        "1 ",
        "1,111",
        "1/",
        ".",
        "(((",
        r"\frac{",
        r"\frac{1}{1",
        r"\boxed{",
        r"\text{",
        "answer is ",
        "\n",
        "^ ",
        "-",
    ],
)
def test_a_hostile_megabyte_takes_no_time(unit, reference):
    start = time.perf_counter()
    assert not verify(unit * (2**20 // len(unit)), reference)
    assert not verify("The answer is " + unit * (19_000 // len(unit)), reference)
    assert time.perf_counter() - start < 1


def test_only_the_end_of_a_long_response_is_read():
    assert verify("word " * 10_000 + "so it is 12", "12")
    assert not verify("The answer is 12. " + "word " * 10_000, "12")
    assert not verify("9" * 30_000, "9" * 20_000)  # a cut number is none


@pytest.mark.parametrize("response", ["7:30", "It is 7:30.", "The time: 7:30", "The answer is 7:30.", "\\boxed{7:30}"])
def test_a_colon_between_digits_stays(response):
    assert verify(response, "7:30")
    assert not verify(response, "30") and not verify(response, "7:31") and not verify(response, "7")
